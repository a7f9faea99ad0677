"""Load the inputs that a recipe names: training rows, their order, and the method."""

from __future__ import annotations

from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfgen_ds import methods
from selfgen_ds.chat.template import asks_for_date
from selfgen_ds.config import Recipe, Sources, sources
from selfgen_ds.data.batches import StepBatches
from selfgen_ds.data.correction import Correction, correction
from selfgen_ds.data.encoding import Format
from selfgen_ds.data.packing import load_packs
from selfgen_ds.data.row_checks import Columns
from selfgen_ds.data.samples import Samples, load
from selfgen_ds.data.tokenizer import generation_ends
from selfgen_ds.errors import Problems
from selfgen_ds.methods.method import Method, Plan


def load_samples(
    problems: Problems, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Samples], list[Samples]]:
    """Load the training and the evaluation rows, and add the problems of both; data with a problem are empty."""
    samples: list[Samples] = []
    eval_samples: list[Samples] = []
    with problems.collect():
        samples = load_data(recipe, tokenizer)
    with problems.collect():
        eval_samples = load_eval_data(recipe, tokenizer)
    return samples, eval_samples


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Samples]:
    """Load the samples of every source of `data.train`.

    Raises:
        InputError: A source cannot be read, a row is not as expected, or no row is usable.
    """
    return _load(recipe, recipe.data.train, "train", tokenizer, None)


def load_eval_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Samples]:
    """Load the first samples of the sources of `data.eval`, `eval.max_samples` in all; none without `data.eval`.

    Raises:
        InputError: As `load_data`.
    """
    if recipe.data.eval is None:
        return []
    return _load(recipe, recipe.data.eval, "test", tokenizer, recipe.eval.max_samples)


def _load(
    recipe: Recipe, given: Sources, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> list[Samples]:
    data = recipe.data
    form = Format(
        columns=Columns(prompt=data.prompt_column, completion=data.completion_column, messages=data.messages_column),
        as_chat=data.as_chat,
        prompt_template=data.prompt_template,
        date=(data.date or str(date.today())) if asks_for_date(tokenizer) else None,
        end_ids=generation_ends(recipe.model),
        assistant_turns=data.assistant_turns,
        max_length=data.max_length,
        limit=limit,
    )
    return load(given, split, tokenizer, form)


def load_step_batches(recipe: Recipe, samples: list[Samples], **shape: Any) -> StepBatches:
    """Arrange the training rows in the recipe's order, packed if the recipe says so.

    Args:
        shape: Shape of the steps: `step_size`, `micro_batch_size`, `rank`, `world_size`, `epochs` (see `StepBatches`).

    Raises:
        InputError: The weight of a source comes to less than one row per epoch.
    """
    weights = [source.weight for source in sources(recipe.data.train) if source.weight is not None]
    return StepBatches(
        samples,
        packs=[load_packs(source, recipe.data.max_length) for source in samples] if recipe.data.packing else None,
        weights=weights or None,
        group_by_length=recipe.data.group_by_length,
        seed=recipe.seed,
        **shape,
    )


def load_method(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, samples: list[Samples], batches: StepBatches, total_steps: int
) -> Method:
    """Create the recipe's method.

    Raises:
        InputError: The method cannot work with the recipe's settings or data.
    """
    method_class = methods.find(recipe.selfgen.method)
    asks = "cue" in method_class.settings
    plan = Plan(
        seed=recipe.seed,
        total_steps=total_steps,
        step_size=batches.step_size,
        epoch_size=len(batches),
        micro_batch_size=batches.micro_batch_size,
        max_length=recipe.data.max_length,
        tokenizer=tokenizer,
        correction=correction(samples, tokenizer, recipe.selfgen.cue) if asks else Correction(),
    )
    method = method_class(recipe.selfgen, plan)
    method.check(samples)
    return method
