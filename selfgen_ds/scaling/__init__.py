"""`selfgen-ds bench`: measure the cost of training on the model's own tokens."""
