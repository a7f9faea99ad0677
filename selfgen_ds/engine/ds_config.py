"""Read the DeepSpeed JSON and fill its `"auto"` values from the recipe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from selfgen_ds import packaged
from selfgen_ds.config import Recipe
from selfgen_ds.errors import InputError
from selfgen_ds.files import refusal

_LEAST_BUCKET = 1 << 20  # elements; in a small model, the square of the hidden size is a collective for each parameter
HIDDEN_SIZE_KEYS = {
    "zero_optimization.reduce_bucket_size": lambda hidden: max(hidden * hidden, _LEAST_BUCKET),
    "zero_optimization.stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "zero_optimization.stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
"""Sizes that follow from the hidden size, as in transformers' Trainer: its JSONs have the same meaning here."""


def zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed JSON."""
    return config.get("zero_optimization", {}).get("stage", 0)


def read(path: str) -> dict[str, Any]:
    """Return the JSON as it stands, with its `"auto"` values.

    Raises:
        InputError: The file cannot be read or is not a JSON object.
    """
    file = packaged.find(path, "ds_configs")
    if not file.is_file():
        raise InputError(f"deepspeed: no file {path!r}; the packaged JSONs are {packaged.names('ds_configs')}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"deepspeed: {refusal(error) or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"deepspeed: {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"deepspeed: {path}, line {error.lineno}: malformed JSON: {error.msg}") from error
    if not isinstance(config, dict):
        raise InputError(f"deepspeed: {path}: expected a JSON object, got {type(config).__name__}")
    return config


def offloads_activations(config: dict[str, Any]) -> bool:
    """Return whether activation checkpointing keeps the layers' inputs in host memory.

    Args:
        config: A JSON in which `deepspeed_json.problems` found none.
    """
    return config.get("activation_checkpointing", {}).get("cpu_checkpointing", False)


def resolve(recipe: Recipe, config: dict[str, Any], world_size: int, hidden_size: int) -> HfTrainerDeepSpeedConfig:
    """Return the JSON with all `"auto"` values filled.

    The batch sizes are for `world_size` ranks, even in a resumed run whose JSON names the sizes of its first
    ranks. Keep the returned object: while it lives and the stage is 3, `transformers` creates models sharded.

    Args:
        config: A JSON in which `deepspeed_json.problems` found none. It is not changed.
    """
    filled = fill(recipe, config, world_size)
    for key, size in HIDDEN_SIZE_KEYS.items():
        filled.fill_only(key, size(hidden_size))
    shape = recipe.train.shape(world_size)
    filled.config["gradient_accumulation_steps"] = shape.accumulation
    filled.config["train_batch_size"] = shape.micro_batch_size * shape.accumulation * world_size
    return filled


def fill(recipe: Recipe, config: dict[str, Any], world_size: int) -> HfTrainerDeepSpeedConfig:
    """Return the JSON with the `"auto"` values that the recipe and the number of ranks decide.

    `mismatches` of the returned object lists values that differ from the recipe's.
    """
    shape, optim = recipe.train.shape(world_size), recipe.optim
    filled = HfTrainerDeepSpeedConfig(_with_defaults(recipe, config))
    micro, accumulation = shape.micro_batch_size, shape.accumulation
    filled.fill_match("train_micro_batch_size_per_gpu", micro, "train.micro_batch_size")
    filled.fill_match("gradient_accumulation_steps", accumulation, "train.gradient_accumulation_steps")
    filled.fill_match(
        "train_batch_size",
        micro * accumulation * world_size,
        f"train.micro_batch_size * train.gradient_accumulation_steps * {world_size} ranks",
    )
    filled.fill_match("gradient_clipping", optim.max_grad_norm, "optim.max_grad_norm")
    filled.fill_match("bf16.enabled", recipe.model.dtype == "bfloat16", "model.dtype is bfloat16")
    filled.fill_match("optimizer.params.lr", optim.learning_rate, "optim.learning_rate")
    filled.fill_match("optimizer.params.betas", list(optim.betas), "optim.betas")
    filled.fill_match("optimizer.params.eps", optim.epsilon, "optim.epsilon")
    filled.fill_match("optimizer.params.weight_decay", optim.weight_decay, "optim.weight_decay")
    if recipe.wandb_project is not None:
        filled.fill_match("wandb.enabled", True, "wandb_project is given")
        filled.fill_match("wandb.project", recipe.wandb_project, "wandb_project")
    filled.fill_only("fp16.enabled", False)
    return filled


def _with_defaults(recipe: Recipe, config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the JSON with the keys that it leaves out."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {}},
        "tensorboard": {"enabled": True},
        **config,
    }
    if recipe.wandb_project is not None:
        config["wandb"] = {"enabled": True, "project": recipe.wandb_project} | config.get("wandb", {})
        # DeepSpeed passes neither a name nor a folder on; wandb reads these variables.
        os.environ.setdefault("WANDB_NAME", recipe.run_name or Path(recipe.output_dir).name)
        os.environ.setdefault("WANDB_DIR", recipe.output_dir)
    for monitor in ("tensorboard", "csv_monitor"):
        if monitor in config:  # by default, DeepSpeed writes into the working directory
            config[monitor] = {"output_path": recipe.output_dir, "job_name": monitor} | config[monitor]
    params: dict[str, Any] = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    if "offload_optimizer" not in config.get("zero_optimization", {}):
        # DeepSpeed's own Adam is compiled at its first use. torch's fused one needs no compiler, and it makes no
        # temporary tensors either.
        params |= {"torch_adam": True, "fused": True}
    config["optimizer"] = config["optimizer"] | {"params": params | config["optimizer"].get("params", {})}
    return config
