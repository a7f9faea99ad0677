"""Checks of a run's output folder: empty, or left by an earlier start of the same run."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from selfgen_ds.config import DataConfig, Recipe, by_name, flat
from selfgen_ds.errors import Problems

# Settings that may change when a run is resumed. A change of any other setting would make it another run.
_MAY_CHANGE = (
    "output_dir",
    "resume",
    "run_name",
    "wandb_project",
    "trust_checkpoint",
    "train.max_steps",
    "train.max_nonfinite_steps",
    "train.stall_seconds",
    "train.start_stall_seconds",
    "model.lora.export",
    "checkpoint.",
    "eval.",
    "selfgen.generation_batch_size",
    "selfgen.generate_command",
)


def check_same_run(problems: Problems, recipe: Recipe, json_config: dict[str, Any]) -> None:
    """Check that the output folder is empty, or holds the run that the recipe resumes."""
    folder = Path(recipe.output_dir)
    if not (folder / "config.yaml").exists():
        if foreign := [name for name in ("model", "checkpoints", "metrics.jsonl") if (folder / name).exists()]:
            problems.add(f"output_dir: {folder} holds {', '.join(foreign)}, but no config.yaml; choose another folder")
    elif recipe.resume is None:
        problems.add(f"output_dir: {folder} holds a run already; continue it with --resume auto")
    else:
        _check_unchanged(problems, folder, recipe, json_config)


def recorded_date(recipe: Recipe) -> str | None:
    """Return the `data.date` of the run that a recipe resumes; None if no run or no date is there."""
    written = Path(recipe.output_dir) / "config.yaml"
    content: Any = None
    if recipe.resume is not None:
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # `check_same_run` reports these
            content = yaml.safe_load(written.read_text(encoding="utf-8"))
    return flat(content).get("data.date") if isinstance(content, dict) else None


def check_nothing_overwritten(problems: Problems, recipe: Recipe) -> None:
    """Check that a run without a checkpoint, which starts from the beginning, has no results yet.

    A run that was killed before its first checkpoint has neither a model nor a step after this checkpoint.
    """
    folder, every = Path(recipe.output_dir), recipe.checkpoint.every
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    results = [f"metrics of {lines} steps"] if lines > every else []
    if (folder / "model").exists():
        results.append("a trained model")
    if results:
        problems.add(
            f"resume: {folder} holds {' and '.join(results)}, but no checkpoint to resume from; put checkpoints/ back, "
            "or choose another output_dir"
        )


def _check_unchanged(problems: Problems, folder: Path, recipe: Recipe, json_config: dict[str, Any]) -> None:
    written = folder / "config.yaml"
    # A setting that an older version did not write had the value that is its default now.
    defaults = by_name(Recipe(output_dir="", deepspeed="", data=DataConfig(train="")))
    content = None
    with suppress(yaml.YAMLError):
        content = yaml.safe_load(written.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        problems.add(f"{written}: expected the recipe that `train` wrote; restore it, or choose another output_dir")
        return
    before = defaults | flat(content)
    now = by_name(recipe)
    changed = [
        f"{setting} was {before.get(setting)!r} and is {now.get(setting)!r}"
        for setting in sorted(before.keys() | now.keys())
        if before.get(setting) != now.get(setting) and not setting.startswith(_MAY_CHANGE)
    ]
    if changed:
        problems.add(
            f"resume: {folder} was started with other settings: {'; '.join(changed)}; restore them, or choose another "
            "output_dir"
        )
    steps_before, steps = before.get("train.max_steps"), recipe.train.max_steps
    if steps_before is not None and steps is not None and steps < steps_before:
        problems.add(f"train.max_steps: a resumed run may only raise it, was {steps_before} and is {steps}")
    json_before = json.loads((folder / "ds_config.json").read_text(encoding="utf-8"))
    stage_before, stage = (c.get("zero_optimization", {}).get("stage") for c in (json_before, json_config))
    if stage_before != stage:
        problems.add(
            f"resume: {folder} was started with ZeRO stage {stage_before}, not {stage}; restore it, or choose another "
            "output_dir"
        )
