"""The manifest of a checkpoint, and queries over all manifests in a folder.

`checkpoints/step-000100/` holds DeepSpeed's files (without frozen parameters), one file of generator states per rank,
and the model's Hugging Face configuration, tokenizer, and list of tensors. The manifest, `complete.json`, is written
last: a folder without this file is half-written, and is neither loaded nor counted. The manifest of a checkpoint whose
files are not as they were written is called `broken.json` instead.
"""

from __future__ import annotations

import json
import logging
import math
import re
import zlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from selfgen_ds.files import damaged, refusal, write_atomically

log = logging.getLogger("selfgen_ds")

MARKER = "complete.json"
BROKEN = "broken.json"
HF_FOLDER = "huggingface"
_CRC = "crc32"
_STEP = re.compile(r"step-\d{6,}")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint, as its manifest describes it."""

    path: Path
    step: int
    """Optimizer steps done."""
    step_size: int
    """Rows of one optimizer step, over all ranks."""
    data: int
    """Checksum of the training data."""
    metrics: dict[str, float]
    """Evaluation metrics after the step; empty if the step was not evaluated."""
    files: list[dict[str, list[int]]] = field(default_factory=list)
    """One dictionary per rank, by rank: name of a file that the rank wrote -> [bytes, CRC-32]."""
    shared: bool = True
    """Whether all hosts wrote to one folder. Otherwise a host's folder holds the files of its own ranks."""
    unevaluated: dict[str, float] | None = None
    """The step's training metrics if a signal cut its evaluation short, which is then still to be done."""

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote the checkpoint."""
        return len(self.files)


def path_of(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint in a folder of checkpoints."""
    return folder / f"step-{step:06d}"


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the complete checkpoints in this host's folder, oldest first.

    Only manifests are read; `resuming.find` verifies the files.
    """
    checkpoints = []
    for marker in marked(folder, MARKER):
        try:
            content = json.loads(marker.read_text(encoding="utf-8"))
            if content.pop(_CRC) != _crc(content):
                raise ValueError
            checkpoints.append(Checkpoint(path=marker.parent, **content))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _warn_once(f"{refusal(error) or f'{marker} is not as it was written'}; ignoring this checkpoint")
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


@cache
def _warn_once(problem: str) -> None:
    """Log a problem of a folder that is read several times."""
    log.warning(problem)


def half_written(folder: Path) -> list[Path]:
    """Return the folders of checkpoints that a killed run has not completed."""
    return [path for path in _step_folders(folder) if not _exists(path / MARKER) and not _exists(path / BROKEN)]


def marked(folder: Path, *names: str) -> list[Path]:
    """Return the files of these names, `MARKER` or `BROKEN`, in the folders of checkpoints."""
    return [path / name for path in _step_folders(folder) for name in names if _exists(path / name)]


def _exists(marker: Path) -> bool:
    """Return whether a marker exists. One in a folder that cannot be searched may exist, and counts."""
    try:
        return marker.exists()
    except OSError:
        return True


def _step_folders(folder: Path) -> list[Path]:
    """Return the folders of checkpoints in any state. A user may keep folders of other names beside them."""
    return sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name)) if folder.exists() else []


def write_marker(checkpoint: Checkpoint, name: str = MARKER) -> None:
    """Write the manifest: from then on the checkpoint is complete (or broken, if `name` is `BROKEN`)."""
    content = {field: value for field, value in vars(checkpoint).items() if field != "path"}
    write_atomically(checkpoint.path / name, json.dumps(content | {_CRC: _crc(content)}, indent=1))


def mark_newer_broken(folder: Path, checkpoint: Checkpoint) -> None:
    """Make sure that no newer checkpoint is ever loaded or counted again. Their files stay, for somebody to look at."""
    for marker in marked(folder, MARKER):
        if int(marker.parent.name.removeprefix("step-")) > checkpoint.step:
            try:
                marker.rename(marker.with_name(BROKEN))
            except OSError as error:
                log.warning(
                    "%s cannot be marked as broken (%s), and a later start may take it: remove it",
                    *(marker.parent, refusal(error)),
                )


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def broken_files(checkpoint: Checkpoint, files: dict[str, list[int]]) -> list[str]:
    """Return the names of the files that are missing, cannot be read, or are not as they were written.

    Args:
        files: The part of `checkpoint.files` to read: name -> [bytes, CRC-32].
    """
    return damaged(checkpoint.path, files)


def better(value: float, other: float, metric: str) -> bool:
    """Return whether `value` of an evaluation metric beats `other`: a lower `loss`, a higher anything else."""
    if math.isnan(other):
        return not math.isnan(value)
    return value < other if metric == "loss" else value > other


def best_of(checkpoints: list[Checkpoint], metric: str) -> Checkpoint | None:
    """Return the checkpoint with the best value of an evaluation metric; of equal ones, the oldest."""
    best = None
    for checkpoint in checkpoints:
        if metric in checkpoint.metrics and (
            best is None or better(checkpoint.metrics[metric], best.metrics[metric], metric)
        ):
            best = checkpoint
    return best
