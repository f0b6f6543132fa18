"""The decode step compiled for devices that are not there: what fits, what moves, what it takes.

Nothing here runs a program. `python -m lamina_jax.bench aot` prints the table.
"""
