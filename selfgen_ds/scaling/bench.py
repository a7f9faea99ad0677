"""`selfgen-ds bench`: measure the cost of training on the model's own tokens, as ratios to sft and to `generate()`."""

from __future__ import annotations

import gc
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from selfgen_ds.config import Recipe
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.errors import Problems
from selfgen_ds.files import make_folder, write_atomically
from selfgen_ds.model.loading import model_config, parameter_count
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import raise_on_all_ranks
from selfgen_ds.scaling import drawing, losses, report
from selfgen_ds.scaling.environment import environment
from selfgen_ds.scaling.steps import BUDGET, FULL, Block, BlockBenchmark
from selfgen_ds.validation import deepspeed_json
from selfgen_ds.validation.inputs import check_positions
from selfgen_ds.validation.options import check_bench
from selfgen_ds.validation.settings import check_settings

log = logging.getLogger("selfgen_ds")


def bench(recipe: Recipe, overrides: set[str], grid: str, steps: int) -> None:
    """Measure a grid, and write `bench.json` and `bench.png` to the output folder.

    Collective: every rank must call this, because the ranks draw and train together.

    Args:
        recipe: The model, the DeepSpeed JSON, the rows per micro-batch, and the tokens per row; the data is not read.
        overrides: Settings given on the command line.
        grid: `budget` for the blocks `BUDGET` and the loss; `rollouts` for rounds; `full` for all of these and `FULL`.
        steps: Timed steps of every variant.

    Raises:
        InputError: The recipe or the JSON is not as expected.
    """
    blocks = {"budget": BUDGET, "full": FULL}.get(grid, [])
    json_config = _check(recipe, overrides, blocks, steps)
    folder = Path(recipe.output_dir)
    make_folder(folder, "output_dir")  # on every rank, so that a folder that cannot be made stops all of them
    process_group.init_process_group()
    with raise_on_all_ranks():
        config = model_config(recipe.model, load_tokenizer(recipe.model))
        problems = Problems()
        check_positions(problems, recipe, config)
        problems.raise_all()
        parameters = parameter_count(recipe.model, config)
    dtype = getattr(torch, recipe.model.dtype)
    record: dict[str, Any] = {
        "environment": environment(),
        "parameter_bytes": parameters * dtype.itemsize,
        "grid": grid,
        "recipe": asdict(recipe),
        "deepspeed": json_config,
        "rows": [],
        "losses": [],
        "drawing": [],
    }
    if grid != "rollouts" and dist.get_rank() == 0:
        log.info("measuring the loss")
        record["losses"] = losses.measure(config.get_text_config(decoder=True).hidden_size, dtype)
    for number, block in enumerate(blocks, start=1):
        on = "on" if block.checkpointing else "off"
        shape = f"accumulation {block.accumulation}, activation checkpointing {on}"
        log.info("measuring steps, block %d of %d: %s", number, len(blocks), shape)
        record["rows"] += BlockBenchmark(recipe, json_config, block).measure(steps)
        _save(folder, record)
    if grid != "budget":
        log.info("measuring rounds")
        record["drawing"] = drawing.measure(recipe, json_config)
        _save(folder, record)
    if dist.get_rank() == 0:
        report.show(folder, record)
    dist.barrier()


def _check(recipe: Recipe, overrides: set[str], blocks: list[Block], steps: int) -> dict[str, Any]:
    """Check the settings of every block, and return the DeepSpeed JSON as it stands."""
    problems = Problems()
    check_bench(problems, recipe, steps)
    json_config = check_settings(problems, drawing.block(recipe).of(recipe), overrides)
    problems.raise_all()
    for block in blocks:
        problems.add(*deepspeed_json.problems(block.of(recipe), json_config, process_group.world_size()))
    problems.raise_all()
    return json_config


def _save(folder: Path, record: dict[str, Any]) -> None:
    """Write `bench.json`, with the rows measured up to now."""
    gc.collect()  # an engine is in a reference cycle; the next one may need its memory
    if dist.get_rank() == 0:
        write_atomically(folder / "bench.json", json.dumps(record, indent=1) + "\n")
