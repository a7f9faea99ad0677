"""The problems that checks find, as lists for assertions."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

from selfgen_ds.config import Recipe
from selfgen_ds.errors import Problems
from selfgen_ds.validation.recipe import check_recipe
from selfgen_ds.validation.settings import check_settings


def found_by(check: Callable[..., object], *arguments: Any) -> list[str]:
    """Return the lines that a check adds."""
    problems = Problems()
    check(problems, *arguments)
    return problems.lines


def recipe_problems(recipe: Recipe) -> list[str]:
    """Return the problems of a recipe by itself."""
    return found_by(check_recipe, recipe)


def settings_problems(recipe: Recipe, overrides: Set[str] = frozenset()) -> list[str]:
    """Return the problems of a recipe, its JSON, and its method."""
    return found_by(check_settings, recipe, overrides)
