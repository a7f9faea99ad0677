"""The recipe that the checks train with."""

from __future__ import annotations

from typing import Any

from gpu_checks.rows import Report
from selfgen_ds.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, Recipe, SelfgenConfig, TrainConfig


def small_recipe(report: Report, **changes: Any) -> Recipe:
    """Return a recipe that learns to sort letters with scheduled sampling, from scratch."""
    sizes = report.sizes
    settings: dict[str, Any] = {
        "output_dir": str(report.folder / "run"),
        "deepspeed": sizes.deepspeed,
        "data": DataConfig(train="builtin:sort", max_length=64),
        "model": ModelConfig(preset=sizes.model, tokenizer="byte", dtype=sizes.dtype),
        "selfgen": SelfgenConfig(replace_probability=0.25, temperature=2.0),
        "optim": OptimConfig(learning_rate=1e-3, weight_decay=0.0, warmup_ratio=0.0, schedule="constant"),
        "train": TrainConfig(max_steps=sizes.steps, micro_batch_size=16),
        "checkpoint": CheckpointConfig(every=sizes.save_every, keep=2),
    }
    return Recipe(**settings | changes)
