"""The processes of a run: their process group, signals, and signs of life."""
