"""Evaluation: scores on the reference's prefixes and on the model's own, their plots, and the comparison of runs."""
