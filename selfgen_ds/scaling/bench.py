"""`selfgen-ds bench`: what training on own tokens costs, as ratios to what it is compared with in the same run."""

from __future__ import annotations

import gc
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from selfgen_ds.config import Recipe
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.files import make_folder
from selfgen_ds.model.loading import model_config, parameter_count
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import raise_on_all_ranks
from selfgen_ds.scaling import drawing, losses, report
from selfgen_ds.scaling.steps import BUDGET, FULL, Engine
from selfgen_ds.setup.inputs import check_positions, check_settings

log = logging.getLogger("selfgen_ds")


def bench(recipe: Recipe, overrides: set[str], grid: str, steps: int) -> None:
    """Measure a grid, and write `bench.json` and `bench.png` into the output folder. Collective.

    Args:
        recipe: Of model, JSON, rows a micro-batch and tokens a row; its data is not read.
        overrides: Settings that were given on the command line.
        grid: `budget`: the steps that the budget is about, and the loss; `rollouts`: what rounds draw; `full`: every
            step, and both.
        steps: Timed ones of every variant.

    Raises:
        InputError: Bad input or configuration.
    """
    if recipe.data.max_length < 16:
        raise InputError(f"data.max_length: expected 16 or more to bench, got {recipe.data.max_length}")
    blocks = {"budget": BUDGET, "full": FULL}.get(grid, [])
    json_config = check_settings(_alone(recipe), overrides)
    for block in blocks:
        check_settings(block.of(recipe), overrides)
    folder = Path(recipe.output_dir)
    make_folder(folder, "output_dir")  # by all: what is refused is refused on every rank
    process_group.init_process_group()
    with raise_on_all_ranks():
        config = model_config(recipe.model, load_tokenizer(recipe.model))
        check_positions(recipe, config)
        parameters = parameter_count(recipe.model, config)
    found: dict[str, Any] = {
        "environment": report.environment(),
        "parameter_bytes": parameters * getattr(torch, recipe.model.dtype).itemsize,
        "grid": grid,
        "recipe": asdict(recipe),
        "deepspeed": json_config,
        "rows": [],
        "losses": [],
        "drawing": [],
    }

    def save() -> None:
        gc.collect()  # an engine is a cycle, and the next one may need its memory
        if dist.get_rank() == 0:
            report.save(folder, found)

    if grid != "rollouts" and dist.get_rank() == 0:
        log.info("the loss")
        hidden_size = config.get_text_config(decoder=True).hidden_size
        found["losses"] = losses.measure(hidden_size, getattr(torch, recipe.model.dtype))
    for number, block in enumerate(blocks, start=1):
        log.info(
            "steps, block %d of %d: accumulation %d, activation checkpointing %s",
            number,
            len(blocks),
            block.accumulation,
            "on" if block.checkpointing else "off",
        )
        found["rows"] += Engine(recipe, json_config, block).measure(steps)
        save()
    if grid != "budget":
        log.info("rollouts and rounds")
        found["drawing"] = drawing.measure(_alone(recipe), json_config)
        save()
    if dist.get_rank() == 0:
        report.show(folder, found)
    dist.barrier()


def _alone(recipe: Recipe) -> Recipe:
    """Every micro-batch a step."""
    return replace(recipe, train=replace(recipe.train, gradient_accumulation_steps=1))
