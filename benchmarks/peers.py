"""Our steps compared with the alternatives, in one run: the same rows, model and DeepSpeed JSON.

    pip install -e '.[peers]' -c constraints.txt
    deepspeed --num_accelerators 2 benchmarks/peers.py --config recipes/bench.yaml

Takes a recipe and overrides as `bench` does, and writes `peers.json` to the output folder. The contenders take turns
step by step in the same processes, each with a model and an engine of its own:

- `sft`; `scheduled sampling` with one pass; `bash`, whose exact mixture is drawn with gathered weights and then trained
  on (here the weights are gathered for the rows of every step; in a run, once for a whole round)
- `TRL sft`: SFTTrainer with its defaults; `without metrics`: it computes the loss only
- `TRL gkd`: GKDTrainer that answers every prompt itself (lmbda = 1); the teacher is a second model with the same
  weights. With activation checkpointing it generates without a cache; `with cache`: it is told to use one
- `generate`: the plain way to write scheduled sampling: `generate()` forced to the reference at every position that is
  not drawn, then logits and loss, with sharded weights; `gathered`: DeepSpeed gathers the weights for `generate()`

No answer ends early: all contenders generate, and train on, the same number of tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from contenders import OURS, Contenders, P
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from turns import Turns

from selfgen_ds.cli import recipe_of
from selfgen_ds.engine import ds_config
from selfgen_ds.files import make_folder, write_atomically
from selfgen_ds.ranks import process_group
from selfgen_ds.scaling.environment import environment
from selfgen_ds.scaling.report import table

WARM_UP, TURNS = 2, 12
STEPS = 1 + WARM_UP + TURNS + 1 + 1  # to create the optimizer's states, the turns, the memory, the end of the training
SLOW, EVERY = {"TRL gkd", "TRL gkd, with cache", "generate", "generate, gathered"}, 3  # they step in every third turn
MEASURED = {"sft", "scheduled sampling", "TRL sft", "TRL sft, without metrics"}
"""Contenders whose memory is measured."""


def main() -> None:
    recipe, _ = recipe_of(sys.argv[1:])
    train = replace(recipe.train, gradient_accumulation_steps=1, activation_checkpointing=True)
    recipe = replace(recipe, train=train)
    make_folder(Path(recipe.output_dir), "output_dir")
    process_group.init_process_group()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Contenders(recipe, STEPS), folder)
    if dist.get_rank() == 0:
        settings = {"p": P, "turns": TURNS, "recipe": asdict(recipe), "deepspeed": ds_config.read(recipe.deepspeed)}
        record: dict[str, Any] = {"environment": environment(), **settings, "rows": rows}
        record["environment"]["versions"] |= {name: version(name) for name in ("trl", "accelerate")}
        write_atomically(Path(recipe.output_dir) / "peers.json", json.dumps(record, indent=1) + "\n")
        show(rows)
    dist.barrier()
    process_group.leave_process_group()


def measure(contenders: Contenders, folder: str) -> list[dict[str, Any]]:
    """Return a row of `peers.json` per contender.

    Collective: every rank must call this, because the ranks train together.
    """
    turns = {name: Turns(loop, name in MEASURED) for name, loop in contenders.loops(folder).items()}
    times: dict[str, dict[int, float]] = {name: {} for name in turns}
    for number in range(-WARM_UP, TURNS):
        for name, contender in turns.items():
            if name in SLOW and number % EVERY:
                continue
            synchronize()
            started = time.perf_counter()
            contender.step()
            synchronize()
            if number >= 0:
                times[name][number] = time.perf_counter() - started
    tokens = contenders.rows.numel() // STEPS
    rows = [summary(name, seconds, times["sft"], tokens) for name, seconds in times.items()]
    for row in rows:
        name = row["contender"]
        if name in OURS:
            row["passes"] = contenders.passes[name]
        if name in MEASURED:
            row["peak_memory_bytes"] = process_group.max_over_ranks([turns[name].peak()])[0]
            row["peak_memory_ratio"] = row["peak_memory_bytes"] / rows[0]["peak_memory_bytes"]
    return rows


def summary(name: str, times: dict[int, float], sft: dict[int, float], tokens: int) -> dict[str, Any]:
    """Return the quartiles of a contender's step time, and of its ratio to the time of sft's step in the same turn.

    Args:
        times: Seconds of the contender's step, by turn.
        sft: Seconds of sft's step, by turn.
        tokens: Tokens of a step, over all ranks.
    """
    low, ratio, high = np.percentile([seconds / sft[turn] for turn, seconds in times.items()], [25, 50, 75])
    quartiles = np.percentile(list(times.values()), [25, 50, 75])
    return {
        "contender": name,
        "steps": len(times),
        "step_time_s": quartiles.tolist(),
        "step_time_ratio": float(ratio),
        "step_time_ratio_quartiles": [float(low), float(high)],
        "tokens_per_second": float(tokens / quartiles[1]),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    cells = [
        {
            "": row["contender"],
            "time": f"{row['step_time_ratio']:.3f}",
            "quartiles": " ".join(f"{ratio:.3f}" for ratio in row["step_time_ratio_quartiles"]),
            "memory": f"{row['peak_memory_ratio']:.3f}" if "peak_memory_ratio" in row else "",
            "steps": str(row["steps"]),
            "step ms": f"{1e3 * row['step_time_s'][1]:.0f}",
            "tokens/s": f"{row['tokens_per_second']:.0f}",
        }
        for row in rows
    ]
    Console(highlight=False, width=120).print(table("time and memory: divided by sft's", cells))


def synchronize() -> None:
    """Wait until all ranks have finished their work. Collective: every rank must call this."""
    get_accelerator().synchronize()
    dist.barrier()


if __name__ == "__main__":
    main()
