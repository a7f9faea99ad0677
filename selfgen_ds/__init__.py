"""Train causal language models on the tokens they will meet when they run: their own."""

__version__ = "0.1.0"
