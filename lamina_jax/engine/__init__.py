"""The engine: which requests run, on which pages, in which order, and the loop that dispatches them."""
