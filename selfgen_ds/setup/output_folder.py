"""The folder of a run: new, or of this very run, which goes on in it."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import IO, Any

import yaml

from selfgen_ds.config import DataConfig, Recipe, to_yaml
from selfgen_ds.errors import InputError
from selfgen_ds.files import lock, make_folder

# What may change when a run is resumed; everything else would make it another run.
_MAY_CHANGE = (
    "output_dir",
    "resume",
    "trust_checkpoint",
    "train.max_steps",
    "train.max_nonfinite_steps",
    "train.stall_seconds",
    "checkpoint.",
    "eval.",
    "selfgen.generation_batch_size",
)


def open_output(recipe: Recipe, json_config: dict[str, Any]) -> IO[str]:
    """Check it, and keep other runs from writing to it.

    Returns:
        What holds the folder while it is open.

    Raises:
        InputError: It belongs to another run, or could not be resumed.
    """
    folder = Path(recipe.output_dir)
    if glob.escape(recipe.output_dir) != recipe.output_dir:
        raise InputError(f"output_dir: expected none of *?[ in {recipe.output_dir!r}, which DeepSpeed loads by pattern")
    make_folder(folder, "output_dir")
    folder_lock = lock(folder, "output_dir")
    _check_output(recipe, json_config, folder)
    return folder_lock


def _check_output(recipe: Recipe, json_config: dict[str, Any], folder: Path) -> None:
    if recipe.model.name_or_path and Path(recipe.model.name_or_path).resolve() == (folder / "model").resolve():
        raise InputError(f"output_dir: {folder / 'model'} is model.name_or_path, and would be replaced")
    written = folder / "config.yaml"
    if not written.exists():
        if foreign := [name for name in ("model", "checkpoints", "metrics.jsonl") if (folder / name).exists()]:
            raise InputError(f"output_dir: {folder} holds {', '.join(foreign)}, but no run's config.yaml")
        return
    if recipe.resume is None:
        raise InputError(f"output_dir: {folder} holds a run already; continue it with --resume auto")
    try:
        # a setting that an older version did not write was at what is its default now
        unset = Recipe(output_dir="", deepspeed="", data=DataConfig(train=""))
        defaults = flat(unset)
        before = defaults | _flat(yaml.safe_load(written.read_text(encoding="utf-8")))
    except (yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{written}: not a run's recipe") from error
    now = flat(recipe)
    changed = [
        f"{setting} was {before.get(setting)!r} and is {now.get(setting)!r}"
        for setting in sorted(before.keys() | now.keys())
        if before.get(setting) != now.get(setting) and not setting.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise InputError(f"resume: {folder} was started with other settings: {'; '.join(changed)}")
    steps_before, steps = before.get("train.max_steps"), recipe.train.max_steps
    if steps_before is not None and steps is not None and steps < steps_before:
        raise InputError(f"train.max_steps: may be raised on resume, was {steps_before} and is {steps}")
    json_before = json.loads((folder / "ds_config.json").read_text(encoding="utf-8"))
    stage_before, stage = (c.get("zero_optimization", {}).get("stage") for c in (json_before, json_config))
    if stage_before != stage:
        raise InputError(f"resume: {folder} was started with ZeRO stage {stage_before}, not {stage}")


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its name, such as `train.max_steps`, as `config.yaml` has it."""
    return _flat(yaml.safe_load(to_yaml(recipe)))


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
