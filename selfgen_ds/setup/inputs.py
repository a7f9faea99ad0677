"""What a recipe names, checked and loaded: settings, data, method. No model and no other rank is needed for it."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from selfgen_ds import methods
from selfgen_ds.checkpoint import checkpoint
from selfgen_ds.config import (
    DataConfig,
    Recipe,
    SelfgenConfig,
    Sources,
    problems,
    sources,
)
from selfgen_ds.data.batches import StepBatches
from selfgen_ds.data.correction import Correction, correction
from selfgen_ds.data.packing import load_packs
from selfgen_ds.data.rows import Columns
from selfgen_ds.data.samples import Format, Samples, load
from selfgen_ds.data.tasks import TASKS
from selfgen_ds.engine import ds_config, ds_config_checks
from selfgen_ds.errors import InputError
from selfgen_ds.evaluation.metrics import METRICS, RECOVERY_METRICS
from selfgen_ds.methods.method import Method, Plan, RoundMethod
from selfgen_ds.methods.reject import load_reject
from selfgen_ds.model.loading import most_positions
from selfgen_ds.model.policy import Sampling
from selfgen_ds.ranks import process_group

log = logging.getLogger("selfgen_ds")


def check_settings(recipe: Recipe, overrides: set[str]) -> dict[str, Any]:
    """All problems of recipe and JSON at once; returns the JSON.

    Raises:
        InputError: A line for every problem.
    """
    found = problems(recipe)
    try:
        found += _unread_settings(recipe.selfgen, overrides)
    except InputError as error:  # no such method
        found.append(str(error))
    for setting, given in {"data.train": recipe.data.train, "data.eval": recipe.data.eval}.items():
        for source in sources(given):
            if source.path.startswith("builtin:") and source.path.removeprefix("builtin:") not in TASKS:
                found.append(f"{setting}: unknown task {source.path!r}; known are builtin:{', builtin:'.join(TASKS)}")
    eval_is_task = all(source.path.startswith("builtin:") for source in sources(recipe.data.eval))
    metrics = METRICS | (RECOVERY_METRICS if eval_is_task else {})
    if recipe.eval.best not in metrics:
        found.append(f"eval.best: expected one of {', '.join(metrics)}, got {recipe.eval.best!r}")
    try:
        load_reject(recipe.selfgen.reject)
    except InputError as error:
        found.append(str(error))
    json_config: dict[str, Any] = {}
    try:
        json_config = ds_config.read(recipe.deepspeed)
        first_ranks = _first_ranks(recipe) if recipe.resume == "auto" else None
        found += ds_config_checks.problems(recipe, json_config, process_group.world_size(), first_ranks)
    except InputError as error:
        found.append(str(error))
    if found:
        raise InputError("\n".join(dict.fromkeys(found)))
    return json_config


def _first_ranks(recipe: Recipe) -> int | None:
    """Ranks that the run in `output_dir` was started with; None if it has no checkpoint."""
    complete = checkpoint.complete_checkpoints(Path(recipe.output_dir) / "checkpoints")
    rows = recipe.train.micro_batch_size * recipe.train.gradient_accumulation_steps  # of a rank
    return complete[-1].step_size // rows if complete else None


def _unread_settings(selfgen: SelfgenConfig, overrides: set[str]) -> list[str]:
    """Settings that the method ignores: errors, but for those of a recipe written for another method."""
    read = methods.find(selfgen.method).settings | {"method"}
    changed = [f.name for f in fields(selfgen) if f.name not in read and getattr(selfgen, f.name) != f.default]
    if "selfgen.method" in overrides:
        foreign = [name for name in changed if f"selfgen.{name}" not in overrides]
        changed = [name for name in changed if name not in foreign]
        if foreign:
            log.info("%s does not read the recipe's selfgen.%s", selfgen.method, ", selfgen.".join(foreign))
    return [f"selfgen.{name}: {selfgen.method} does not read it; remove it" for name in changed]


def check_positions(recipe: Recipe, config: PretrainedConfig) -> None:
    """Refuse rows that the model has no positions for.

    Raises:
        InputError: `data.max_length` is more than the model takes.
    """
    positions = most_positions(config)
    if positions is not None and recipe.data.max_length > positions:
        raise InputError(
            f"data.max_length: expected at most the model's {positions} positions, got {recipe.data.max_length}"
        )


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Samples]:
    """The samples of every source of `data.train`.

    Raises:
        InputError: A source cannot be read, a row is not as expected, or none is usable.
    """
    return _load(recipe.data, recipe.data.train, "train", tokenizer, None)


def load_eval_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Samples]:
    """The samples of every source of `data.eval`, `eval.max_samples` in all.

    Raises:
        InputError: As `load_data`.
    """
    assert recipe.data.eval is not None
    return _load(recipe.data, recipe.data.eval, "test", tokenizer, recipe.eval.max_samples)


def _load(
    data: DataConfig, given: Sources, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> list[Samples]:
    columns = Columns(prompt=data.prompt_column, completion=data.completion_column, messages=data.messages_column)
    form = Format(columns=columns, assistant_turns=data.assistant_turns, max_length=data.max_length, limit=limit)
    return load(given, split, tokenizer, form)


def check_shares(recipe: Recipe, samples: list[Samples]) -> None:
    """Refuse data that `data.max_length` does too much harm to.

    Raises:
        InputError: More truncated or refused rows than the recipe allows.
    """
    data = recipe.data
    for source in samples:
        refused = f"prompts leave no room for a response (the first is {source.first_refused})"
        for count, share, setting, what in (
            (source.refused, data.max_refused_share, "max_refused_share", refused),
            (source.truncated, data.max_truncated_share, "max_truncated_share", "responses are cut"),
        ):
            if count > share * source.read:
                raise InputError(
                    f"{source.name}: {count} of {source.read} {what} at data.max_length={data.max_length}; "
                    f"data.{setting}={share} allows fewer"
                )


def load_step_batches(recipe: Recipe, samples: list[Samples], **shape: Any) -> StepBatches:
    """The training rows in the recipe's order, packed if it says so.

    Args:
        shape: Of the steps: `step_size`, `micro_batch_size`, `rank`, `world_size`, `epochs` (see `StepBatches`).

    Raises:
        InputError: A source's weight is less than one row an epoch.
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
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, samples: list[Samples], windows: StepBatches, total_steps: int
) -> Method:
    """The recipe's method.

    Raises:
        InputError: It cannot work with the recipe's settings or data.
    """
    found = methods.find(recipe.selfgen.method)
    plan = Plan(
        seed=recipe.seed,
        total_steps=total_steps,
        step_size=windows.step_size,
        epoch_size=len(windows),
        micro_batch_size=recipe.train.micro_batch_size,
        max_length=recipe.data.max_length,
        tokenizer=tokenizer,
        correction=correction(samples, tokenizer, recipe.selfgen.cue) if "cue" in found.settings else Correction(),
    )
    method = found(recipe.selfgen, plan)
    if isinstance(method, RoundMethod):
        selects = type(method).select is not RoundMethod.select
        if recipe.data.packing and (selects or not method.keeps_lengths):
            raise InputError(
                f"data.packing: expected false with {recipe.selfgen.method}, whose rows are not as many or as long as "
                "the samples; data.group_by_length saves padding"
            )
        method.check(samples)
    return method


def sampling(recipe: Recipe) -> Sampling:
    """The distribution that tokens are drawn from."""
    selfgen = recipe.selfgen
    return Sampling(temperature=selfgen.temperature, top_p=selfgen.top_p, top_k=selfgen.top_k)
