"""From a recipe to a run that stands at its first step."""
