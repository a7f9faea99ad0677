"""How a model does on its own prefixes against the reference's: metrics, plots, and the comparison of runs."""
