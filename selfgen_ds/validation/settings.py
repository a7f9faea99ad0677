"""Checks of recipe, DeepSpeed JSON, and method together, before any rank waits for another."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from selfgen_ds import methods
from selfgen_ds.checkpoint import manifest
from selfgen_ds.config import Recipe, SelfgenConfig, sources
from selfgen_ds.data.tasks import task_of
from selfgen_ds.engine import ds_config
from selfgen_ds.errors import Problems
from selfgen_ds.evaluation.metrics import IN_TRAINING, RECOVERY
from selfgen_ds.methods.reject import load_reject
from selfgen_ds.ranks import process_group
from selfgen_ds.validation import deepspeed_json
from selfgen_ds.validation.recipe import check_recipe

log = logging.getLogger("selfgen_ds")


def check_settings(problems: Problems, recipe: Recipe, overrides: set[str]) -> dict[str, Any]:
    """Check all settings of a recipe and its JSON, and return the JSON as it stands; an unreadable one is empty.

    Args:
        overrides: Settings that were given on the command line.
    """
    check_recipe(problems, recipe)
    with problems.collect():  # there may be no such method
        _check_unread_settings(problems, recipe.selfgen, overrides)
        _check_packing(problems, recipe)
    with problems.collect():
        load_reject(recipe.selfgen.reject)
    eval_is_task = all(task_of(source.path) is not None for source in sources(recipe.data.eval))
    metrics = IN_TRAINING + (RECOVERY if eval_is_task else ())
    problems.expect(recipe.eval.best in metrics, "eval.best", f"one of {', '.join(metrics)}", recipe.eval.best)
    json_config: dict[str, Any] = {}
    with problems.collect():
        json_config = ds_config.read(recipe.deepspeed)
        # Sizes less than 1 are reported above; DeepSpeed would blame the JSON for them.
        names = "rows_per_step", "micro_batch_size", "gradient_accumulation_steps"
        given = {name: value for name in names if (value := getattr(recipe.train, name)) is not None}
        sized = replace(recipe, train=replace(recipe.train, **{name: max(1, value) for name, value in given.items()}))
        first_ranks = _first_ranks(sized) if recipe.resume == "auto" else None
        problems.add(*deepspeed_json.problems(sized, json_config, process_group.world_size(), first_ranks))
    return json_config


def _check_unread_settings(problems: Problems, selfgen: SelfgenConfig, overrides: set[str]) -> None:
    """Refuse settings that the method ignores, except those of a recipe that was written for another method."""
    read = methods.find(selfgen.method).settings | {"method"}
    unread = [f.name for f in fields(selfgen) if f.name not in read and getattr(selfgen, f.name) != f.default]
    if "selfgen.method" in overrides:
        of_the_recipe = [name for name in unread if f"selfgen.{name}" not in overrides]
        unread = [name for name in unread if name not in of_the_recipe]
        if of_the_recipe:
            log.info("%s does not read the recipe's selfgen.%s", selfgen.method, ", selfgen.".join(of_the_recipe))
    problems.add(
        *(f"selfgen.{name}: {selfgen.method} does not read this setting; remove the setting" for name in unread)
    )


def _check_packing(problems: Problems, recipe: Recipe) -> None:
    """Refuse packing with a method whose rows are not the samples: packs are made before a method makes its rows."""
    if recipe.data.packing and not methods.find(recipe.selfgen.method).keeps_rows:
        problems.add(
            f"data.packing: expected false with {recipe.selfgen.method}, whose rows differ from the samples in number "
            "and length; use data.group_by_length to save padding"
        )


def _first_ranks(recipe: Recipe) -> int | None:
    """Return the number of ranks that the run in `output_dir` was started with, or None if it has no checkpoint."""
    complete = manifest.complete_checkpoints(Path(recipe.output_dir) / "checkpoints")
    if recipe.train.rows_per_step is not None:
        return None
    return complete[-1].step_size // recipe.train.shape(1).rows if complete else None
