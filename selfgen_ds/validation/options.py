"""Checks of the options of `evaluate`, `generate`, `inspect`, `bench`, and `compare`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfgen_ds.checkpoint.manifest import MARKER
from selfgen_ds.config import CompareOptions, EvaluateOptions, GenerateOptions, Recipe
from selfgen_ds.errors import InputError, Problems
from selfgen_ds.evaluation import predictions
from selfgen_ds.validation.recipe import check_model_folder, check_texts
from selfgen_ds.validation.sources import check_sources


@contextmanager
def naming_the_options() -> Iterator[None]:
    """Call the settings of the recipe's section `model` by the options' names in errors of the block."""
    try:
        yield
    except InputError as error:
        message = str(error).replace("model.name_or_path", "--model")
        options = "dtype|attn_implementation|chat_template|trust_remote_code"
        raise InputError(re.sub(rf"\bmodel\.({options})\b", r"--\1", message)) from error


def check_evaluate(problems: Problems, options: EvaluateOptions) -> None:
    """Check the options of `evaluate` that need no model."""
    for setting in ("max_samples", "max_new_tokens", "batch_size", "answers_per_prompt"):
        value = getattr(options, setting)
        problems.expect(value is None or value >= 1, f"--{setting}", "1 or more", value)
    problems.expect(0 <= options.seed < 2**31, "--seed", f"0 to {2**31 - 1}", options.seed)
    problems.expect(options.correction_rounds >= 0, "--correction_rounds", "0 or more", options.correction_rounds)
    if options.cue is not None and not options.correction_rounds:
        problems.add("--cue: expected --correction_rounds as well")
    temperatures, noise = options.sample_temperatures, options.weight_noise
    problems.expect(all(t > 0 for t in temperatures), "--sample_temperatures", "numbers above 0", temperatures)
    problems.expect(all(share > 0 for share in noise), "--weight_noise", "numbers above 0", noise)
    if options.answers_per_prompt > 1 and not temperatures:
        problems.add("--answers_per_prompt: expected --sample_temperatures as well")
    for setting in ("prefix_shares", "forced_error_shares"):
        shares = getattr(options, setting)
        problems.expect(all(0 <= share < 1 for share in shares), f"--{setting}", "shares from 0 to less than 1", shares)
    for setting in ("sample_temperatures", "prefix_shares", "forced_error_shares", "weight_noise", "weight_bits"):
        values = getattr(options, setting)
        problems.expect(len(set(values)) == len(values), f"--{setting}", "every value once", values)
    if (options.judge_url is None) != (options.judge_model is None):
        problems.add("--judge_model: expected with --judge_url, and only then")
    url, against = options.judge_url, options.judge_against
    problems.expect(
        url is None or url.startswith(("http://", "https://")), "--judge_url", "http://... or https://...", url
    )
    if against != "reference" and url is None:
        problems.add("--judge_against: expected --judge_url as well")
    elif against != "reference" and not (Path(against) / predictions.FILE).is_file():
        problems.add(f"--judge_against: expected `reference` or a folder with {predictions.FILE}, got {against!r}")
    check_model_folder(problems, "--model", options.model)
    if options.oracle is not None:
        check_model_folder(problems, "--oracle", options.oracle)
        same = Path(options.oracle).resolve() == Path(options.model).resolve()
        problems.expect(not same, "--oracle", "another model than --model", options.oracle)
    problems.expect(
        options.metric is None or bool(re.fullmatch(r"[\w.]+:\w+", options.metric)),
        "--metric",
        "module:function",
        options.metric,
    )
    check_texts(problems, "--", options.prompt_template, options.date)
    share = options.max_refused_share
    problems.expect(0 <= share < 1, "--max_refused_share", "0 to less than 1", share)
    check_sources(problems, "--data", options.data)


def check_generate(problems: Problems, options: GenerateOptions) -> None:
    """Check the options of `generate`."""
    if options.prompt is not None and options.prompts is not None:
        problems.add("--prompts: expected no --prompt as well")
    if options.output is not None and options.prompts is None:
        problems.add("--output: expected --prompts as well")
    if options.output is not None:
        folder = Path(options.output).parent
        problems.expect(folder.is_dir(), "--output", "a file in an existing folder", options.output)
        problems.expect(not Path(options.output).exists(), "--output", "a file that does not exist", options.output)
    if not (Path(options.model) / MARKER).is_file():
        check_model_folder(problems, "--model", options.model)
    check_texts(problems, "--", options.prompt_template, None)
    most = options.max_new_tokens
    problems.expect(most is None or most >= 1, "--max_new_tokens", "1 or more", most)
    problems.expect(options.temperature >= 0, "--temperature", "0 or more", options.temperature)
    problems.expect(0 <= options.seed < 2**31, "--seed", f"0 to {2**31 - 1}", options.seed)


def check_evaluated_length(problems: Problems, length: int | None, positions: int | None) -> None:
    """Check the length of the longest row that `evaluate` reads, in tokens.

    Args:
        positions: The model's positions; None if its configuration sets no limit.
    """
    if length is None:
        problems.add("--max_length: expected a length, because the model sets no limit")
    elif not 2 <= length <= (positions or length):
        problems.add(f"--max_length: expected 2 to the model's {positions} positions, got {length}")


def check_answered_length(problems: Problems, needed: int, positions: int) -> None:
    """Check that the longest prompt and `--max_new_tokens` fit into the model's positions."""
    if needed > positions:
        problems.add(f"--max_new_tokens: prompt and answer may come to {needed} tokens, the model has {positions}")


def check_corrected_length(problems: Problems, needed: int, positions: int) -> None:
    """Check that the model has positions for a prompt, an answer, the cue, and the corrected answer."""
    if needed > positions:
        problems.add(
            f"--correction_rounds: the longest prompt, two answers as long as the longest response, and the cue come "
            f"to {needed} tokens, the model has {positions} positions; a smaller --max_length leaves out or cuts rows"
        )


def check_inspect(problems: Problems, rows: int) -> None:
    """Check the options of `inspect`."""
    problems.expect(rows >= 0, "--rows", "0 or more", rows)


def check_bench(problems: Problems, recipe: Recipe, steps: int) -> None:
    """Check the options of `bench`, and that rows are long enough to be split into prompt and answer."""
    problems.expect(steps >= 1, "--steps", "1 or more", steps)
    length = recipe.data.max_length
    problems.expect(length >= 16, "data.max_length", "16 or more to bench", length)


def check_compare(problems: Problems, options: CompareOptions) -> None:
    """Check that every run is given once."""
    counts = Counter(Path(run).resolve() for run in options.runs)
    problems.add(*(f"runs: {run} is given twice" for run, count in counts.items() if count > 1))
