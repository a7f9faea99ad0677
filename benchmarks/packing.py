"""Real tokens a second of padded, length-grouped and packed rows, step by step in turn on one engine.

    deepspeed --num_accelerators 2 benchmarks/packing.py --config recipes/gsm8k.yaml --data.train FILE

Takes a recipe and its overrides as `train` does, trains nothing that is kept, and prints the median and quartiles.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch.distributed as dist

from selfgen_ds.cli import recipe_of
from selfgen_ds.engine.step import train_step
from selfgen_ds.ranks import process_group
from selfgen_ds.setup.inputs import load_data, load_step_batches
from selfgen_ds.setup.prepare import prepare

_STEPS = 8


def main() -> None:
    recipe, overrides = recipe_of(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        recipe = replace(recipe, output_dir=folder, data=replace(recipe.data, packing=True))
        run = prepare(recipe, overrides | {"output_dir", "data.packing"})
        samples = load_data(recipe, run.tokenizer)
        shape: dict[str, Any] = {
            "step_size": run.windows.step_size,
            "micro_batch_size": recipe.train.micro_batch_size,
            "rank": dist.get_rank(),
            "world_size": dist.get_world_size(),
            "epochs": None,
        }
        variants = {}
        for name in ("padded", "group_by_length", "packing"):
            data = replace(recipe.data, packing=name == "packing", group_by_length=name == "group_by_length")
            variants[name] = load_step_batches(replace(recipe, data=data), samples, **shape)
        rates: dict[str, list[float]] = {name: [] for name in variants}
        real: dict[str, list[float]] = {name: [] for name in variants}
        for step in range(_STEPS + 1):
            for name, windows in variants.items():
                window = windows.window(step)
                dist.barrier()
                started = time.perf_counter()
                result = train_step(run.engine, run.method.contexts(window, run.policy, run.total_steps - 1), 0.0)
                if step:  # the first one also fills the caches
                    rates[name].append(result.tokens / (time.perf_counter() - started))
                    ids = [batch.sample_ids for batch in window]
                    real[name].append(sum(int((i >= 0).sum()) for i in ids) / sum(i.numel() for i in ids))
        if dist.get_rank() == 0:
            for name, values in rates.items():
                low, median, high = np.percentile(values, [25, 50, 75])
                ratio = median / np.median(rates["padded"])
                print(
                    f"{name:16} {median:8.0f} real tokens/s [{low:.0f}, {high:.0f}], {ratio:.2f} x padded, "
                    f"{np.mean(real[name]):.1%} of the positions real"
                )
        dist.barrier()
    process_group.leave_process_group()


if __name__ == "__main__":
    main()
