"""Checks of the command lines of `evaluate`, `bench`, and `compare`, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from selfgen_ds.config import CompareOptions, EvaluateOptions, Recipe
from selfgen_ds.errors import InputError, Problems
from selfgen_ds.validation.recipe import check_model_folder
from selfgen_ds.validation.sources import check_sources


def check_evaluate(options: EvaluateOptions) -> None:
    """Check the options of `evaluate` that need no model.

    Raises:
        InputError: One line for every problem.
    """
    problems = Problems()
    for setting in ("max_samples", "batch_size"):
        value = getattr(options, setting)
        problems.expect(value is None or value >= 1, f"--{setting}", "1 or more", value)
    problems.expect(0 <= options.seed < 2**31, "--seed", f"0 to {2**31 - 1}", options.seed)
    problems.expect(options.correction_rounds >= 0, "--correction_rounds", "0 or more", options.correction_rounds)
    if options.cue is not None and not options.correction_rounds:
        problems.add("--cue: expected --correction_rounds as well")
    temperature = options.sample_temperature
    problems.expect(temperature >= 0, "--sample_temperature", "0 or more", temperature)
    check_model_folder(problems, "--model", options.model)
    check_sources(problems, "--data", options.data)
    problems.raise_all()


def evaluated_length(options: EvaluateOptions, positions: int | None) -> int:
    """Return the longest row that `evaluate` reads, in tokens.

    Args:
        positions: The model's positions; None if its configuration sets no limit.

    Raises:
        InputError: The length is missing, or more than the model's positions.
    """
    length = options.max_length or positions
    if length is None:
        raise InputError("--max_length: expected a length, because the model sets no limit")
    if not 2 <= length <= (positions or length):
        raise InputError(f"--max_length: expected 2 to the model's {positions} positions, got {length}")
    return length


def check_corrected_length(needed: int, positions: int) -> None:
    """Check that the model has positions for a prompt, an answer, the cue, and the corrected answer.

    Raises:
        InputError: They may need more tokens than the model has positions.
    """
    if needed > positions:
        raise InputError(
            f"--correction_rounds: the longest prompt, two answers as long as the longest response, and the cue come "
            f"to {needed} tokens, the model has {positions} positions; a smaller --max_length leaves out or cuts rows"
        )


def check_bench(recipe: Recipe) -> None:
    """Check the needs of `bench` that training does not have.

    Raises:
        InputError: Rows are too short to be split into prompt and answer.
    """
    if recipe.data.max_length < 16:
        raise InputError(f"data.max_length: expected 16 or more to bench, got {recipe.data.max_length}")


def check_compare(options: CompareOptions) -> None:
    """Check the options of `compare`.

    Raises:
        InputError: A run is given twice.
    """
    if len({Path(run).resolve() for run in options.runs}) < len(options.runs):
        raise InputError(f"runs: expected each run once, got {options.runs}")
