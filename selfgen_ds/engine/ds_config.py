"""The DeepSpeed JSON: read, checked, its `"auto"` values filled from the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from selfgen_ds.config import InputError, Recipe


def read(path: str) -> dict[str, Any]:
    """The JSON as it stands.

    Raises:
        InputError: It cannot be read or is not a JSON object.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"deepspeed: {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"deepspeed: {path}, line {error.lineno}: malformed JSON: {error.msg}") from error
    if not isinstance(config, dict):
        raise InputError(f"deepspeed: {path}: expected a JSON object, got {type(config).__name__}")
    return config


def problems(recipe: Recipe, config: dict[str, Any], world_size: int) -> list[str]:
    """What is wrong with a JSON, or between it and the recipe, one line each."""
    found = []
    name = recipe.deepspeed
    if config.get("fp16", {}).get("enabled") is True:
        found.append(f"{name}: fp16.enabled: expected false; model.dtype is float32 or bfloat16")
    if "scheduler" in config:
        found.append(f"{name}: scheduler: expected none; optim.schedule and optim.warmup_ratio decide")
    if "activation_checkpointing" in config:
        found.append(
            f"{name}: activation_checkpointing: expected none (DeepSpeed's has no effect on Hugging Face models); "
            "train.activation_checkpointing decides"
        )
    optimizer = str(config.get("optimizer", {}).get("type", "AdamW"))
    if optimizer.lower() != "adamw":
        found.append(f"{name}: optimizer.type: expected 'AdamW', got {optimizer!r}")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 0 and recipe.model.dtype != "float32":
        # the bfloat16 optimizer of stage 0 does not drop steps that are not finite
        found.append(f"{name}: zero_optimization.stage: expected 1, 2 or 3 for {recipe.model.dtype}, got {stage!r}")
    else:
        try:
            DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
        except ValidationError as error:
            found += [
                f"{name}: zero_optimization.{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}"
                for e in error.errors()
            ]
    filled = _fill(recipe, config, world_size)
    found += [
        f"{name}: {mismatch.removeprefix('- ds ').replace(' vs hf ', ' differs from the recipe: ')}"
        for mismatch in filled.mismatches
    ]
    found += [
        f'{name}: {key}: "auto", but no setting of the recipe decides it'
        for key in _autos(filled.config)
        if key not in _HIDDEN_SIZE_KEYS
    ]
    return found


# Sizes that transformers' Trainer takes from the hidden size as well, so that its users' JSONs mean the same here.
_HIDDEN_SIZE_KEYS = {
    "zero_optimization.reduce_bucket_size": lambda hidden: hidden * hidden,
    "zero_optimization.stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "zero_optimization.stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}


def resolve(recipe: Recipe, config: dict[str, Any], world_size: int, hidden_size: int) -> HfTrainerDeepSpeedConfig:
    """The JSON with every `"auto"` filled; assumes that `problems` found none.

    While the returned object lives, `transformers` creates models sharded if the stage is 3: keep it.
    """
    filled = _fill(recipe, config, world_size)
    for key, size in _HIDDEN_SIZE_KEYS.items():
        filled.fill_only(key, size(hidden_size))
    return filled


def _fill(recipe: Recipe, config: dict[str, Any], world_size: int) -> HfTrainerDeepSpeedConfig:
    train, optim = recipe.train, recipe.optim
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {}},
        "tensorboard": {"enabled": True, "output_path": recipe.output_dir, "job_name": "tensorboard"},
        **config,
    }
    params: dict[str, Any] = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    if "offload_optimizer" not in config.get("zero_optimization", {}):
        params["torch_adam"] = True  # DeepSpeed's own Adam is compiled at first use, for the same result
    config["optimizer"] = config["optimizer"] | {"params": params | config["optimizer"].get("params", {})}
    filled = HfTrainerDeepSpeedConfig(config)
    micro, accumulation = train.micro_batch_size, train.gradient_accumulation_steps
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
    filled.fill_only("fp16.enabled", False)
    return filled


def _autos(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"
