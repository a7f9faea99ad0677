"""Build a run from a recipe, ready for its first step or for the step after its checkpoint."""
