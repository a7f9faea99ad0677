"""Rounds: drawn by a method, written to disk, and read as training rows."""
