"""The attention worker's process: its ports, who may use it, and what it reports of itself.

It stands above `pool` (the KV pages and the programs over them) and `exchange` (how bytes travel), and is
no part of an engine.
"""
