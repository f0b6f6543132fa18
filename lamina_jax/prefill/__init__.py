"""Prefill hosts: they compute the KV of prompts, which the attention workers of an engine pull."""
