"""Checkpoints on disk: weights into arrays, and the tokenizer that belongs to them."""
