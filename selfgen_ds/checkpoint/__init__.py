"""Checkpoints: written, verified, loaded, converted to other numbers of ranks, and exported."""
