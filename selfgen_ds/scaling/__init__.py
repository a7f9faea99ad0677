"""`selfgen-ds bench`: what training on the model's own tokens costs."""
