"""How the bundled model is made: its text, its tokenizer, its recall tasks, and the training loop.

Serving never imports this package; it reads the folder that training leaves behind.
"""
