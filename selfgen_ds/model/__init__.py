"""The causal LM: its weights, its LM head, and what methods ask of it."""
