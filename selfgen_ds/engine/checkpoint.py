"""Checkpoints that count only when they are complete.

`checkpoints/step-000100/` holds DeepSpeed's files (without frozen parameters), one file of generator states a rank,
the model's Hugging Face configuration, tokenizer and list of tensors, and, written last by rank 0 after a barrier,
`complete.json`: the step, a checksum of the training data, the evaluation metrics of that step, and size and CRC-32 of
every file by the rank that wrote it. A checkpoint that turns out to be broken loses its name to `broken.json`: it is
neither loaded nor counted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from transformers import PreTrainedTokenizerBase

from selfgen_ds.config import InputError, LoraConfig, ModelConfig
from selfgen_ds.engine.content import Content
from selfgen_ds.files import absolute_folder, intact, sync_and_sum, write_atomically

log = logging.getLogger("selfgen_ds")

MARKER = "complete.json"
BROKEN = "broken.json"
HF_FOLDER = "huggingface"
_ADAPTED = "adapted_model.json"

# No checkpoint is unpickled as code: torch refuses everything but tensors, plain containers and these classes,
# which DeepSpeed keeps in its files; it passes `weights_only=False` itself, which this overrides.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    """Optimizer steps done."""
    world_size: int
    data: int
    """Checksum of the training data."""
    metrics: dict[str, float]
    """Evaluation metrics after that step; empty if none were taken."""
    files: list[dict[str, list[int]]]
    """By rank: file name -> [bytes, CRC-32] of what it wrote."""
    unevaluated: dict[str, float] | None = None
    """The step's metrics, where a signal came in its evaluation: that is still to be made."""


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints, oldest first. Files are not opened: `load_newest` verifies them."""
    found = []
    for marker in folder.glob(f"step-*/{MARKER}"):
        try:
            found.append(Checkpoint(path=marker.parent, **json.loads(marker.read_text(encoding="utf-8"))))
        except (ValueError, TypeError):
            log.warning("%s is unreadable, the checkpoint is passed over", marker)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def required_bytes(parameters: int, dtype: str) -> int:
    """Size of a checkpoint: the trained weights, and their float32 master weights and two Adam moments."""
    return parameters * ((4 if dtype == "float32" else 2) + 3 * 4)


def save(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    step: int,
    data: int,
    metrics: dict[str, float],
    tokenizer: PreTrainedTokenizerBase,
    model: ModelConfig,
    unevaluated: dict[str, float] | None = None,
) -> None:
    """Write a checkpoint. Collective, at an optimizer step's boundary. A crash leaves older ones untouched.

    Of a model with adapters it holds the adapters, and where the model is.
    """
    rank, path = dist.get_rank(), folder / f"step-{step:06d}"
    if rank == 0 and path.exists():
        _remove(path)  # left half-written by a run that was killed
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=path.name, save_latest=False, exclude_frozen_parameters=True)
    torch.save(_generator_states(engine.device), path / f"generators_rank_{rank}.pt")
    if rank == 0:
        engine.module.config.save_pretrained(path / HF_FOLDER)
        engine.module.generation_config.save_pretrained(path / HF_FOLDER)
        tokenizer.save_pretrained(path / HF_FOLDER)
        Content.of(engine.module).write(path)
        if model.lora is not None and model.name_or_path is not None:
            located = asdict(model) | {"name_or_path": absolute_folder(model.name_or_path)}
            (path / _ADAPTED).write_text(json.dumps(located, indent=1), encoding="utf-8")
    dist.barrier()

    written = [f for f in path.rglob("*") if f.is_file() and _writer(f.name, dist.get_world_size()) == rank]
    manifest = {str(f.relative_to(path)): sync_and_sum(f) for f in written}
    manifests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(manifests, manifest)
    if rank == 0:
        marker = {"step": step, "world_size": dist.get_world_size(), "data": data, "metrics": metrics}
        marker |= {"unevaluated": unevaluated, "files": manifests}
        write_atomically(path / MARKER, json.dumps(marker, indent=1))
    dist.barrier()


def record_evaluation(folder: Path, step: int, metrics: dict[str, float]) -> None:
    """What a checkpoint still lacked that was saved in the step's evaluation. Rank 0 alone."""
    marker = folder / f"step-{step:06d}" / MARKER
    written = json.loads(marker.read_text(encoding="utf-8"))
    write_atomically(marker, json.dumps(written | {"metrics": metrics, "unevaluated": None}, indent=1))


def load_newest(engine: deepspeed.DeepSpeedEngine, folder: Path, data: int) -> Checkpoint | None:
    """Load the newest checkpoint whose files are all as they were written; broken ones are passed over, for good.

    Args:
        data: Checksum of the training data.

    Returns:
        What was loaded, or None if nothing was ever saved.

    Raises:
        InputError: All checkpoints are broken, or the newest intact one is of other data or of another number of ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for checkpoint in reversed(_agreed(complete_checkpoints(folder))):
        if checkpoint.world_size != world_size:
            raise InputError(
                f"{checkpoint.path} was written by {checkpoint.world_size} ranks and cannot be resumed on {world_size}"
            )
        everyone: list[Any] = [None] * world_size
        dist.all_gather_object(everyone, broken_files(checkpoint, rank))
        if names := sorted(name for names in everyone for name in names):
            log.warning("%s is broken (%s) and is passed over", checkpoint.path, ", ".join(names))
            if rank == 0:
                (checkpoint.path / MARKER).rename(checkpoint.path / BROKEN)
            continue
        if checkpoint.data != data:
            raise InputError(f"data.train: not the rows that {checkpoint.path} was trained on")
        # frozen parameters are not in the file: they are where the model came from
        whole = all(p.requires_grad for p in engine.module.parameters())
        loaded, _ = engine.load_checkpoint(str(folder), tag=checkpoint.path.name, load_module_strict=whole)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed did not load {checkpoint.path}")
        _restore_generators(torch.load(checkpoint.path / f"generators_rank_{rank}.pt"), engine.device)
        return checkpoint
    # rank 0 has just renamed markers: the others must not look for themselves
    damaged = _agreed(sorted({marker.parent for name in (BROKEN, MARKER) for marker in folder.glob(f"step-*/{name}")}))
    if damaged:
        raise InputError(f"resume: every checkpoint is broken, the newest is {damaged[-1]}")
    return None


def adapted_model(path: Path) -> ModelConfig | None:
    """The model that a checkpoint's adapters belong to, its folder's path absolute; None if it holds a whole model."""
    if not (path / _ADAPTED).exists():
        return None
    settings = json.loads((path / _ADAPTED).read_text(encoding="utf-8"))
    return ModelConfig(**settings | {"lora": LoraConfig(**settings["lora"])})


def broken_files(checkpoint: Checkpoint, rank: int) -> list[str]:
    """Files that are not as this rank wrote them."""
    return [name for name, entry in checkpoint.files[rank].items() if not intact(checkpoint.path / name, entry)]


def retain(folder: Path, keep: int, metric: str) -> None:
    """Remove all but the newest `keep` complete checkpoints and the best one by `metric`. Rank 0 alone.

    Folders that a killed run left half-written go too; damaged ones stay, for somebody to look at.
    """
    complete = complete_checkpoints(folder)
    best = best_of(complete, metric)
    superfluous = [checkpoint.path for checkpoint in complete[:-keep] if checkpoint != best]
    half_written = [p for p in folder.glob("step-*") if not (p / MARKER).exists() and not (p / BROKEN).exists()]
    for path in superfluous + half_written:
        _remove(path)


def better(value: float, other: float, metric: str) -> bool:
    """Whether a value of an evaluation metric is the better one: a lower `loss`, or a higher anything else."""
    if math.isnan(other):
        return not math.isnan(value)
    return value < other if metric == "loss" else value > other


def best_of(checkpoints: list[Checkpoint], metric: str) -> Checkpoint | None:
    """The checkpoint with the best value of an evaluation metric, the oldest of equal ones."""
    best = None
    for checkpoint in checkpoints:
        if metric in checkpoint.metrics and (
            best is None or better(checkpoint.metrics[metric], best.metrics[metric], metric)
        ):
            best = checkpoint
    return best


def _agreed(seen: list[Any]) -> list[Any]:
    """Rank 0's view of a folder, so that all ranks do the same even while a file system catches up. Collective."""
    agreed = [seen]
    dist.broadcast_object_list(agreed, src=0)
    return agreed[0]


def _remove(path: Path) -> None:
    (path / MARKER).unlink(missing_ok=True)  # first, so that no half-removed checkpoint looks complete
    shutil.rmtree(path)


def _writer(name: str, world_size: int) -> int:
    """The rank that wrote a file, by DeepSpeed's names and ours; rank 0 wrote what no rank is named in."""
    parts = name.replace(".", "_").split("_")
    number = parts[parts.index("rank") + 1] if "rank" in parts else "0"
    return int(number) if number.isdigit() and int(number) < world_size else 0


def _generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
