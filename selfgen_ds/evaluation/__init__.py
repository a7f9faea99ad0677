"""Evaluation: scores on reference prefixes and on the model's prefixes, plots, and the comparison of runs."""
