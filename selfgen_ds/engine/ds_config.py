"""The DeepSpeed JSON: read, checked, its `"auto"` values filled from the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from selfgen_ds.config import Recipe
from selfgen_ds.errors import InputError


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


def problems(recipe: Recipe, config: dict[str, Any], world_size: int, first_ranks: int | None = None) -> list[str]:
    """What is wrong with a JSON, or between it and the recipe, one line each.

    Args:
        first_ranks: Those that a run which goes on was started with: batch sizes are theirs.
    """
    sections = (
        "zero_optimization",
        "activation_checkpointing",
        "optimizer",
        "bf16",
        "fp16",
        "tensorboard",
        "csv_monitor",
        "wandb",
    )
    found = [
        f"{key}: expected an object, got {config[key]!r}"
        for key in sections
        if not isinstance(config.get(key, {}), dict)
    ]
    for section, key in (
        ("optimizer", "params"),
        ("zero_optimization", "offload_param"),
        ("zero_optimization", "offload_optimizer"),
    ):
        value = {} if found else config.get(section, {}).get(key, {})
        if not isinstance(value, dict):
            found.append(f"{section}.{key}: expected an object, got {value!r}")
    if not found:
        filled = _fill(recipe, config, first_ranks or world_size)
        autos = [key for key in _autos(filled.config) if key not in (*_HIDDEN_SIZE_KEYS, "zero_optimization.stage")]
        found = _setting_problems(recipe, config)
        found += [m.removeprefix("- ds ").replace(" vs hf ", " differs from the recipe: ") for m in filled.mismatches]
        found += [f'{key}: "auto", but no setting of the recipe decides it' for key in autos]
        if not found:
            found = _library_problems(filled.config)
        if not found:
            found = _machine_problems(config.get("zero_optimization", {}), world_size)
    return [f"{recipe.deepspeed}: {problem}" for problem in found]


def _setting_problems(recipe: Recipe, config: dict[str, Any]) -> list[str]:
    """Settings that DeepSpeed allows and this project does not."""
    found = []
    if config.get("fp16", {}).get("enabled") is True:
        found.append("fp16.enabled: expected false; model.dtype is float32 or bfloat16")
    if config.get("torch_autocast", {}).get("enabled"):
        found.append("torch_autocast.enabled: expected false; the pass and rollouts compute in model.dtype")
    if "scheduler" in config:
        found.append("scheduler: expected none; optim.schedule and optim.warmup_ratio decide")
    # other writers and forms of files are not what a checkpoint's manifest and its safe loading rely on
    found += [f"{key}: expected none; the run decides" for key in ("checkpoint", "datastates_ckpt") if key in config]
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) in (0, 1, 2):
        found += [
            f"zero_optimization.{key}: has no effect before stage 3, got stage {zero.get('stage', 0)}"
            for key in ("offload_param", "zero_hpz_partition_size", "zero_quantized_weights")
            if zero.get(key)
        ]
    found += _checkpointing_problems(recipe, config.get("activation_checkpointing", {}))
    if config.get("wandb", {}).get("enabled") and find_spec("wandb") is None:
        found.append("wandb.enabled: the package wandb is not installed (pip install 'selfgen-ds[wandb]')")
    optimizer = config.get("optimizer", {}).get("type", "AdamW")
    if str(optimizer).lower() != "adamw":
        found.append(f"optimizer.type: expected 'AdamW', got {optimizer!r}")
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        # seen: a resumed run goes on from other weights than were saved, and an export finds none
        found.append(
            "zero_optimization.offload_optimizer.device: expected 'cpu' or 'none', got 'nvme'; "
            "DeepSpeed's checkpoints do not hold what it swaps to disk"
        )
    stage = zero.get("stage", 0)
    # the bfloat16 optimizer of stage 0 does not drop steps that are not finite
    stages = (0, 1, 2, 3) if recipe.model.dtype == "float32" else (1, 2, 3)
    if type(stage) is not int or stage not in stages:
        found.append(f"zero_optimization.stage: expected one of {stages} for {recipe.model.dtype}, got {stage!r}")
    return found


def _checkpointing_problems(recipe: Recipe, section: dict[str, Any]) -> list[str]:
    """Nothing of the section has an effect on Hugging Face models in DeepSpeed; one key has it here."""
    found = [
        f"activation_checkpointing.{key}: has no effect on Hugging Face models; "
        "train.activation_checkpointing and activation_checkpointing.cpu_checkpointing decide"
        for key in section
        if key != "cpu_checkpointing"
    ]
    offload = section.get("cpu_checkpointing", False)
    if not isinstance(offload, bool) and offload != "auto":
        found.append(f"activation_checkpointing.cpu_checkpointing: expected true or false, got {offload!r}")
    if offload is True and not recipe.train.activation_checkpointing:
        found.append("activation_checkpointing.cpu_checkpointing: true, but train.activation_checkpointing is false")
    return found


def stage(config: dict[str, Any]) -> int:
    """ZeRO's; assumes that `problems` found none."""
    return config.get("zero_optimization", {}).get("stage", 0)


def offloads_activations(config: dict[str, Any]) -> bool:
    """Whether what activation checkpointing keeps goes to host memory; assumes that `problems` found none."""
    return config.get("activation_checkpointing", {}).get("cpu_checkpointing", False)


class _Watched(dict):
    """Remembers which keys were asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def _library_problems(config: dict[str, Any]) -> list[str]:
    """What DeepSpeed's own configuration refuses, or would ignore without a word."""
    # sizes do not matter here, and the batch size can only be checked where all ranks are
    config = {key: value for key, value in config.items() if key != "train_batch_size"}
    zero = config.get("zero_optimization", {})
    config["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}
    watched = _Watched(config)
    try:
        DeepSpeedConfig(watched)
    except ValidationError as error:
        section = "zero_optimization" if error.title == DeepSpeedZeroConfig.__name__ else error.title
        return [f"{section}.{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
    except Exception as error:  # DeepSpeed raises several types, each with the key in its text
        return [str(error).strip().split("\n", 1)[0]]
    return [f"{key}: DeepSpeed reads no such key" for key in config.keys() - watched.asked]


def _machine_problems(zero: dict[str, Any], world_size: int) -> list[str]:
    """What DeepSpeed cannot do with these ranks, on this accelerator or on this host, and says late or obscurely."""
    found = []
    size = min(int(zero.get("zero_hpz_partition_size", 1)), world_size)
    if size > 1 and world_size % size:
        found.append(f"zero_hpz_partition_size: expected a divisor of the {world_size} ranks, got {size}")
    if get_accelerator().device_name() == "cpu":
        found += [
            f"{key}: DeepSpeed has no quantization on the CPU accelerator"
            for key, value in zero.items()
            if key.startswith("zero_quantized_") and value
        ]
    offload = zero.get("offload_param") or {}
    if offload.get("device") == "nvme":
        path = offload.get("nvme_path")
        if path is None or not Path(path).is_dir():
            found.append(f"offload_param.nvme_path: expected a folder, got {path!r}")
        if not AsyncIOBuilder().is_compatible():
            found.append("offload_param.device: nvme needs libaio and its headers (Debian: apt-get install libaio-dev)")
    return [f"zero_optimization.{problem}" for problem in found]


# Sizes that transformers' Trainer takes from the hidden size as well, so that its users' JSONs mean the same here.
_HIDDEN_SIZE_KEYS = {
    "zero_optimization.reduce_bucket_size": lambda hidden: hidden * hidden,
    "zero_optimization.stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "zero_optimization.stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}


def resolve(recipe: Recipe, config: dict[str, Any], world_size: int, hidden_size: int) -> HfTrainerDeepSpeedConfig:
    """The JSON with every `"auto"` filled; assumes that `problems` found none.

    Batch sizes are those of these ranks, whatever the JSON says for those that the run was started with. While the
    returned object lives, `transformers` creates models sharded if the stage is 3: keep it.
    """
    filled = _fill(recipe, config, world_size)
    for key, size in _HIDDEN_SIZE_KEYS.items():
        filled.fill_only(key, size(hidden_size))
    train = recipe.train
    filled.config["gradient_accumulation_steps"] = train.gradient_accumulation_steps
    filled.config["train_batch_size"] = train.micro_batch_size * train.gradient_accumulation_steps * world_size
    return filled


def _fill(recipe: Recipe, config: dict[str, Any], world_size: int) -> HfTrainerDeepSpeedConfig:
    train, optim = recipe.train, recipe.optim
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {}},
        "tensorboard": {"enabled": True},
        **config,
    }
    for monitor in ("tensorboard", "csv_monitor"):  # DeepSpeed's default is the working directory
        if monitor in config:
            config[monitor] = {"output_path": recipe.output_dir, "job_name": monitor} | config[monitor]
    params: dict[str, Any] = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    if "offload_optimizer" not in config.get("zero_optimization", {}):
        # DeepSpeed's own Adam is compiled at first use; torch's fused one, like it, makes no temporaries
        params |= {"torch_adam": True, "fused": True}
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
