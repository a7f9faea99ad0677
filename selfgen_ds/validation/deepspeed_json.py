"""Check the DeepSpeed JSON: alone, against the recipe, by DeepSpeed's own rules, and against this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from selfgen_ds.config import Recipe
from selfgen_ds.engine.ds_config import HIDDEN_SIZE_KEYS, fill

_SECTIONS = (
    "zero_optimization",
    "activation_checkpointing",
    "optimizer",
    "bf16",
    "fp16",
    "tensorboard",
    "csv_monitor",
    "wandb",
)
_SUBSECTIONS = {"optimizer": ("params",), "zero_optimization": ("offload_param", "offload_optimizer")}


def problems(recipe: Recipe, config: dict[str, Any], world_size: int, first_ranks: int | None = None) -> list[str]:
    """Return all problems of a JSON, one line each.

    A later kind of check is skipped if an earlier one finds problems, because it could not run or would only report the
    same problems in other words.

    Args:
        first_ranks: The number of ranks that a resumed run was started with: the JSON's batch sizes are for them.
    """
    found = _section_problems(config)
    if not found:
        filled = fill(recipe, config, first_ranks or world_size)
        autos = [key for key in _autos(filled.config) if key not in (*HIDDEN_SIZE_KEYS, "zero_optimization.stage")]
        found = _setting_problems(recipe, config)
        found += [m.removeprefix("- ds ").replace(" vs hf ", " differs from the recipe: ") for m in filled.mismatches]
        found += [f'{key}: "auto", but no setting of the recipe decides it' for key in autos]
        found = found or _library_problems(filled.config)
        found = found or _machine_problems(config.get("zero_optimization", {}), world_size)
    return [f"{recipe.deepspeed}: {problem}" for problem in found]


def _section_problems(config: dict[str, Any]) -> list[str]:
    """Report sections that are not objects. Every other check relies on these types."""
    found = [
        f"{section}: expected an object, got {config[section]!r}"
        for section in _SECTIONS
        if not isinstance(config.get(section, {}), dict)
    ]
    return found or [
        f"{section}.{key}: expected an object, got {config[section][key]!r}"
        for section, keys in _SUBSECTIONS.items()
        for key in keys
        if not isinstance(config.get(section, {}).get(key, {}), dict)
    ]


def _setting_problems(recipe: Recipe, config: dict[str, Any]) -> list[str]:
    """Report settings that DeepSpeed allows and that this project cannot honor."""
    found = []
    if config.get("fp16", {}).get("enabled") is True:
        found.append("fp16.enabled: expected false; model.dtype is float32 or bfloat16")
    if config.get("torch_autocast", {}).get("enabled"):
        found.append("torch_autocast.enabled: expected false; the pass and rollouts compute in model.dtype")
    if "scheduler" in config:
        found.append("scheduler: expected none; optim.schedule and optim.warmup_ratio decide")
    # The manifest of a checkpoint and its safe loading rely on the files that DeepSpeed's default writer makes.
    found += [f"{key}: expected none; the run decides" for key in ("checkpoint", "datastates_ckpt") if key in config]
    found += _checkpointing_problems(recipe, config.get("activation_checkpointing", {}))
    if config.get("wandb", {}).get("enabled") and find_spec("wandb") is None:
        found.append("wandb.enabled: the package wandb is not installed (pip install 'selfgen-ds[wandb]')")
    optimizer = config.get("optimizer", {}).get("type", "AdamW")
    if str(optimizer).lower() != "adamw":
        found.append(f"optimizer.type: expected 'AdamW', got {optimizer!r}")
    return found + _zero_problems(recipe, config.get("zero_optimization", {}))


def _checkpointing_problems(recipe: Recipe, section: dict[str, Any]) -> list[str]:
    """Report keys of `activation_checkpointing` that would be ignored.

    DeepSpeed applies none of these keys to Hugging Face models. This project applies one, `cpu_checkpointing`.
    """
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


def _zero_problems(recipe: Recipe, zero: dict[str, Any]) -> list[str]:
    """Report keys of `zero_optimization` that this project cannot honor."""
    found = []
    stage = zero.get("stage", 0)
    if stage in (0, 1, 2):
        found += [
            f"zero_optimization.{key}: has no effect before stage 3, got stage {stage}"
            for key in ("offload_param", "zero_hpz_partition_size", "zero_quantized_weights")
            if zero.get(key)
        ]
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        # Seen: a resumed run continues from other weights than the saved ones, and an export finds none.
        found.append(
            "zero_optimization.offload_optimizer.device: expected 'cpu' or 'none', got 'nvme'; "
            "DeepSpeed's checkpoints do not hold what it swaps to disk"
        )
    # The bfloat16 optimizer of stage 0 does not drop a step whose gradient is not finite.
    stages = (0, 1, 2, 3) if recipe.model.dtype == "float32" else (1, 2, 3)
    if type(stage) is not int or stage not in stages:
        found.append(f"zero_optimization.stage: expected one of {stages} for {recipe.model.dtype}, got {stage!r}")
    return found


class _KeyRecorder(dict):
    """A dictionary that records which keys are read.

    DeepSpeed ignores an unknown key silently, so that a misspelled key would have no effect. DeepSpeed keeps no list of
    the known keys either: a key is unknown if `DeepSpeedConfig` does not read it.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)


def _library_problems(config: dict[str, Any]) -> list[str]:
    """Report values that DeepSpeed's own configuration refuses, and keys that DeepSpeed would ignore.

    Args:
        config: The filled JSON.
    """
    # DeepSpeed can check the batch size only where all ranks are. Sizes that are still "auto" are not checked.
    config = {key: value for key, value in config.items() if key != "train_batch_size"}
    zero = config.get("zero_optimization", {})
    config["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}
    recorder = _KeyRecorder(config)
    try:
        DeepSpeedConfig(recorder)
    except ValidationError as error:
        zero = error.title == DeepSpeedZeroConfig.__name__
        section = "zero_optimization" if zero else error.title
        found = [f"{section}.{'.'.join(map(str, e['loc']))}: {_reason(e, zero)}" for e in error.errors()]
        return found + (_library_problems(config | {section: {}}) if config.get(section) else [])
    except Exception as error:  # DeepSpeed raises several types, each with the key in its message
        return [str(error).strip().split("\n", 1)[0]]
    return [f"{key}: {_unknown(key, recorder.read)}" for key in sorted(config.keys() - recorder.read)]


def _reason(error: Any, zero: bool) -> str:
    """Return what is wrong with a key of a section, in our words.

    Args:
        error: One of pydantic's errors.
        zero: Whether the section is `zero_optimization`, whose keys are known.
    """
    if error["type"] != "extra_forbidden":
        return f"{error['msg']}, got {error['input']!r}"
    known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()] if zero else []
    return _unknown(str(error["loc"][-1]), known)


def _unknown(key: str, known: Iterable[str]) -> str:
    similar = get_close_matches(key, list(known), n=1, cutoff=0.75)
    return "unknown key: DeepSpeed does not read it" + (f"; did you mean {similar[0]}?" if similar else "")


def _machine_problems(zero: dict[str, Any], world_size: int) -> list[str]:
    """Report settings that DeepSpeed cannot honor with these ranks, this accelerator, or this host.

    DeepSpeed itself would fail late or with an obscure message.
    """
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


def _autos(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys whose value is `"auto"`."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"


def login_problem(recipe: Recipe, config: dict[str, Any]) -> str:
    """Return why this process cannot log in to Weights & Biases, if recipe or JSON turn it on; nothing if it can."""
    if recipe.wandb_project is None and not config.get("wandb", {}).get("enabled"):
        return ""
    import wandb  # an optional dependency

    try:
        wandb.login()  # asks nobody and nothing if it is offline, or has credentials
    except wandb.errors.Error as error:
        return f"wandb_project: {' '.join(str(error).split())} WANDB_MODE=offline needs no login"
    return ""
