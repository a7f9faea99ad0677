"""Checkpoints that count only when they are complete.

`checkpoints/step-000100/` holds DeepSpeed's files (without frozen parameters), one file of generator states a rank,
the model's Hugging Face configuration, tokenizer and list of tensors, and, written last after a barrier,
`complete.json`: the step, the rows of a step, a checksum of the training data, the evaluation metrics of that step,
size and CRC-32 of every file by the rank that wrote it, and its own CRC-32. A checkpoint that turns out to be broken
loses its name to `broken.json`: it is neither loaded nor counted.

Rank 0 makes, marks and removes folders; where hosts do not share them the first rank of every host does, and a
checkpoint counts if it is complete on all hosts.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import shutil
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from selfgen_ds import hashing
from selfgen_ds.checkpoint import universal, unpickling
from selfgen_ds.checkpoint.state_dict_layout import StateDictLayout
from selfgen_ds.config import LoraConfig, ModelConfig
from selfgen_ds.errors import InputError
from selfgen_ds.files import absolute_folder, intact, sync_and_sum, sync_folder, write_atomically
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.storage import Storage

log = logging.getLogger("selfgen_ds")

MARKER = "complete.json"
BROKEN = "broken.json"
HF_FOLDER = "huggingface"
_ADAPTED = "adapted_model.json"
_CRC = "crc32"
_STEP = re.compile(r"step-\d{6,}")
_OF_A_RANK = re.compile(r"(?:zero_pp|generators)_rank_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    """Optimizer steps done."""
    step_size: int
    """Rows of an optimizer step, over all ranks."""
    data: int
    """Checksum of the training data."""
    metrics: dict[str, float]
    """Evaluation metrics after that step; empty if none were taken."""
    files: list[dict[str, list[int]]]
    """By rank: file name -> [bytes, CRC-32] of what it wrote."""
    shared: bool = True
    """Whether the hosts that wrote it shared its folder: else each has a part."""
    unevaluated: dict[str, float] | None = None
    """The step's metrics, where a signal came in its evaluation: that is still to be made."""

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return len(self.files)


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints, oldest first. Files are not opened: `find` verifies them."""
    found = []
    for marker in _named(folder, MARKER):
        try:
            found.append(_read_marker(marker))
        except (ValueError, TypeError, KeyError, AttributeError):
            log.warning("%s is unreadable, the checkpoint is passed over", marker)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _folders(folder: Path) -> list[Path]:
    """Those of checkpoints, whatever state they are in; other names that somebody gave are no matter of ours."""
    return sorted(path for path in folder.glob("step-*") if _STEP.fullmatch(path.name))


def _named(folder: Path, *names: str) -> list[Path]:
    return [path / name for path in _folders(folder) for name in names if (path / name).exists()]


def write_marker(path: Path, content: dict[str, Any]) -> None:
    """Complete a checkpoint.

    Args:
        content: The fields of `Checkpoint` but for `path`.
    """
    write_atomically(path / MARKER, json.dumps(content | {_CRC: _crc(content)}, indent=1))


def _read_marker(marker: Path) -> Checkpoint:
    content = json.loads(marker.read_text(encoding="utf-8"))
    if content.pop(_CRC) != _crc(content):
        raise ValueError("not as it was written")
    return Checkpoint(path=marker.parent, **content)


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


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
    *,
    step_size: int,
    storage: Storage,
    unevaluated: dict[str, float] | None = None,
) -> None:
    """Write a checkpoint. Collective, at an optimizer step's boundary. A crash leaves older ones untouched.

    One of this step that is complete is left as it is: this run has written or loaded it. Of a model with adapters a
    checkpoint holds the adapters, and where the model is.
    """
    path = folder / f"step-{step:06d}"
    if any(checkpoint.step == step for checkpoint in _complete_everywhere(folder, storage)):
        return
    if storage.writes and path.exists():
        _remove(path)  # left half-written by a run that was killed
    dist.barrier()
    try:
        _write(engine, path, tokenizer, model, storage)
    except dist.DistError:  # a rank is missing
        raise
    except (OSError, RuntimeError) as error:  # torch says of a full disk that a position is not as expected
        free = shutil.disk_usage(folder).free
        raise RuntimeError(f"{path} could not be written, with {free / 1e6:,.1f} MB free there: {error}") from error
    dist.barrier()

    written = [f for f in path.rglob("*") if f.is_file() and _is_written_here(f.name, storage)]
    files = process_group.all_gather_object({str(f.relative_to(path)): sync_and_sum(f) for f in written})
    if storage.writes:
        for made in (path / HF_FOLDER, folder, folder.parent):
            sync_folder(made)
        content = {"step": step, "step_size": step_size, "data": data, "metrics": metrics, "files": files}
        write_marker(path, content | {"shared": storage.shared, "unevaluated": unevaluated})
    dist.barrier()


def _write(
    engine: deepspeed.DeepSpeedEngine,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelConfig,
    storage: Storage,
) -> None:
    engine.save_checkpoint(str(path.parent), tag=path.name, save_latest=False, exclude_frozen_parameters=True)
    torch.save(_generator_states(engine.device), path / f"generators_rank_{dist.get_rank()}.pt")
    if storage.writes:
        engine.module.config.save_pretrained(path / HF_FOLDER)
        engine.module.generation_config.save_pretrained(path / HF_FOLDER)
        tokenizer.save_pretrained(path / HF_FOLDER)
        StateDictLayout.of(engine.module).write(path)
        if model.lora is not None and model.name_or_path is not None:
            located = asdict(model) | {"name_or_path": absolute_folder(model.name_or_path)}
            (path / _ADAPTED).write_text(json.dumps(located, indent=1), encoding="utf-8")


def record_evaluation(checkpoint: Checkpoint, metrics: dict[str, float], storage: Storage) -> None:
    """What a checkpoint still lacks that was saved in the step's evaluation."""
    if storage.writes:
        content = {name: value for name, value in vars(checkpoint).items() if name != "path"}
        write_marker(checkpoint.path, content | {"metrics": metrics, "unevaluated": None})


def _is_written_here(name: str, storage: Storage) -> bool:
    """Whether this rank wrote a file, by DeepSpeed's names and ours; what no rank is named in, a keeper did."""
    writer = _OF_A_RANK.search(name)
    return int(writer[1]) == dist.get_rank() if writer else storage.writes


def find(folder: Path, storage: Storage, trust: bool = False) -> Checkpoint | None:
    """The newest checkpoint whose files are all as they were written. Collective.

    Newer ones are broken and are passed over, for good; what was never completed is removed.

    Args:
        trust: Files may run code when they are loaded.

    Returns:
        None if nothing was ever saved.

    Raises:
        InputError: All checkpoints are broken, a file may run code, or hosts have parts of it for other ranks.
    """
    newest = next(reversed(_complete_everywhere(folder, storage)), None)
    if newest is not None:
        _check_ranks(newest, storage)
    found = _newest_intact(folder, storage)
    if found is None:
        if newest is not None and not newest.shared and newest.world_size != dist.get_world_size():
            raise InputError(
                f"resume: {newest.path} was written by {newest.world_size} ranks, on hosts that share no folder; not "
                "all of its parts are here"
            )
        if damaged := _gathered([str(marker.parent) for marker in _named(folder, MARKER, BROKEN)]):
            what = "is broken" if storage.shared else "is broken, or not whole on hosts that share none"
            raise InputError(f"resume: every checkpoint {what}, the newest is {damaged[-1]}")
    else:
        _check_ranks(found, storage)
        mine = [found.path / name for name in _shares(found, storage) if name.endswith(".pt")]
        if lines := _gathered([] if trust else unpickling.refused(mine)):
            raise InputError("\n".join(lines))
    if storage.writes:
        _clean(_half_written(folder))
        shutil.rmtree(folder / universal.FOLDER, ignore_errors=True)  # of a start that was killed
    return found


def _check_ranks(checkpoint: Checkpoint, storage: Storage) -> None:
    before, now = checkpoint.world_size, dist.get_world_size()
    if before != now and not storage.shared:
        raise InputError(
            f"resume: {checkpoint.path} was written by {before} ranks; for {now} it is converted where all hosts share "
            f"{checkpoint.path.parent}, but here they do not"
        )


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint, seed: int, trust: bool = False) -> None:
    """Load a checkpoint that `find` has verified. Collective.

    On another number of ranks it is converted first. Their generators then start anew, from the seed, step and rank.

    Args:
        engine: With `checkpoint.load_universal` in its configuration if ZeRO has to be told of other ranks.

    Raises:
        InputError: There is no room to convert it, or it cannot be divided over these ranks.
    """
    rank, path = dist.get_rank(), checkpoint.path
    # frozen parameters are not in the file: they are where the model came from
    whole = all(p.requires_grad for p in engine.module.parameters())
    weight_decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    converts = engine.load_universal_checkpoint()
    with unpickling.trusting(trust):
        with universal.converted(engine, path) if converts else nullcontext(path.parent) as folder:
            loaded, _ = engine.load_checkpoint(str(folder), tag=path.name, load_module_strict=whole)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed did not load {path}")
        if converts:  # under ZeRO-3 all groups now have the first one's decay, and their parameters one count of steps
            for group, weight_decay in zip(engine.optimizer.param_groups, weight_decays, strict=True):
                group["weight_decay"] = weight_decay
            for state in engine.optimizer.state.values():
                state["step"] = copy.deepcopy(state["step"])
        if checkpoint.world_size == dist.get_world_size():
            _restore_generators(unpickling.load(path / f"generators_rank_{rank}.pt"), engine.device)
        else:
            torch.manual_seed(int(hashing.bits(hashing.GENERATORS, seed, checkpoint.step, rank)))


def adapted_model(path: Path) -> ModelConfig | None:
    """The model that a checkpoint's adapters belong to, its folder's path absolute; None if it holds a whole model."""
    if not (path / _ADAPTED).exists():
        return None
    settings = json.loads((path / _ADAPTED).read_text(encoding="utf-8"))
    return ModelConfig(**settings | {"lora": LoraConfig(**settings["lora"])})


def broken_files(checkpoint: Checkpoint, names: dict[str, list[int]]) -> list[str]:
    """Files that are not as they were written."""
    return [name for name, entry in names.items() if not intact(checkpoint.path / name, entry)]


def retain(folder: Path, keep: int, metric: str, storage: Storage) -> None:
    """Remove all but the newest `keep` complete checkpoints and the best one by `metric`. Collective.

    Nothing is removed before the newest is read back, and found as it was written. Folders that a killed run left
    half-written go too; damaged ones stay, for somebody to look at.
    """
    complete = _complete_everywhere(folder, storage)
    if _superfluous(complete, keep, metric):
        if _newest_intact(folder, storage) is None:
            return
        complete = _complete_everywhere(folder, storage)
    if storage.writes:
        _clean(_superfluous(complete, keep, metric) + _half_written(folder))


def _superfluous(complete: list[Checkpoint], keep: int, metric: str) -> list[Path]:
    best = best_of(complete, metric)
    return [checkpoint.path for checkpoint in complete[:-keep] if checkpoint != best]


def _half_written(folder: Path) -> list[Path]:
    return [path for path in _folders(folder) if not (path / MARKER).exists() and not (path / BROKEN).exists()]


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


def _complete_everywhere(folder: Path, storage: Storage) -> list[Checkpoint]:
    """Checkpoints that are complete on every host, oldest first, as rank 0 sees them. Collective."""
    if storage.shared:
        agreed: list[Any] = [complete_checkpoints(folder) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(agreed, src=0)
        return agreed[0]
    views = process_group.all_gather_object(complete_checkpoints(folder))
    common = set.intersection(*({_identity(checkpoint) for checkpoint in view} for view in views))
    return [replace(c, path=folder / c.path.name) for c in views[0] if _identity(c) in common]


def _identity(checkpoint: Checkpoint) -> str:
    """What a checkpoint is on every host; its evaluation may be recorded later, and on one host only."""
    return repr((checkpoint.step, checkpoint.step_size, checkpoint.data, checkpoint.files))


def _newest_intact(folder: Path, storage: Storage) -> Checkpoint | None:
    """The newest complete checkpoint whose files all are as they were written; newer ones are marked. Collective."""
    for checkpoint in reversed(_complete_everywhere(folder, storage)):
        if names := _gathered(broken_files(checkpoint, _shares(checkpoint, storage))):
            log.warning("%s is broken (%s) and is passed over", checkpoint.path, ", ".join(names))
            continue
        if storage.writes:
            for newer in complete_checkpoints(folder):
                if newer.step > checkpoint.step:
                    (newer.path / MARKER).rename(newer.path / BROKEN)
        return checkpoint
    return None


def _gathered(mine: list[str]) -> list[str]:
    """What all ranks have found, sorted, each once. Collective."""
    return sorted({line for lines in process_group.all_gather_object(mine) for line in lines})


def _shares(checkpoint: Checkpoint, storage: Storage) -> dict[str, list[int]]:
    """The files that this rank verifies: those that it wrote, or its share of them if there were more ranks."""
    rank = dist.get_rank()
    step = dist.get_world_size() if storage.shared else checkpoint.world_size
    return {name: entry for files in checkpoint.files[rank::step] for name, entry in files.items()}


def _clean(paths: list[Path]) -> None:
    for path in paths:
        try:
            _remove(path)
        except OSError as error:  # such as a file that somebody has open, over NFS
            log.warning("%s cannot be removed: %s", path, error)


def _remove(path: Path) -> None:
    (path / MARKER).unlink(missing_ok=True)  # first, so that no half-removed checkpoint looks complete
    shutil.rmtree(path)


def _generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
