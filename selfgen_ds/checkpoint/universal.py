"""A checkpoint of other ranks, converted by DeepSpeed into its universal form, which any number of ranks can load.

The tool that DeepSpeed has for it works in this process, without workers: what `unpickling.py` forbids
holds for it as well.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal

from selfgen_ds.checkpoint import unpickling
from selfgen_ds.errors import InputError
from selfgen_ds.ranks import process_group

log = logging.getLogger("selfgen_ds")

FOLDER = "universal.partial"  # beside the checkpoints, and never taken for one


@contextmanager
def converted(engine: deepspeed.DeepSpeedEngine, path: Path) -> Iterator[Path]:
    """The folder that has a checkpoint converted, under its name, for as long as it is needed. Collective.

    Args:
        engine: That is going to load it.

    Raises:
        InputError: There is no room for it, or the engine cannot load it.
    """
    folder = path.parent / FOLDER
    for problem in filter(None, process_group.all_gather_object(_has_no_share(engine, path) or _has_no_room(path))):
        raise InputError(problem)
    log.info("converting %s for %d ranks, in %.1f MB of disk", path, dist.get_world_size(), _needed(path) / 1e6)
    started = time.perf_counter()
    if dist.get_rank() == 0:
        _convert(path, folder)
    dist.barrier()
    log.info("converted in %.1f s", time.perf_counter() - started)
    yield folder
    dist.barrier()  # everybody has read it
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def _has_no_share(engine: deepspeed.DeepSpeedEngine, path: Path) -> str | None:
    """What is wrong if this rank has nothing of a parameter group, which DeepSpeed cannot load before stage 3."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        return None
    groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    if all(any(parameter._hp_mapping is not None for parameter in group) for group in groups):
        return None
    return (
        f"resume: {path} cannot be loaded by {dist.get_world_size()} ranks, over which ZeRO stage {stage} has too few "
        "norms and biases to divide; fewer ranks can"
    )


def _has_no_room(path: Path) -> str | None:
    need, free = _needed(path), shutil.disk_usage(path).free
    if need <= free:
        return None
    return (
        f"resume: {path} was written by another number of ranks; converting it takes {need / 1e6:,.1f} MB, and "
        f"{free / 1e6:,.1f} MB are free there"
    )


def _needed(path: Path) -> int:
    """Bytes: the pieces of the optimizer's shards, these put together, and a copy of the rest."""
    optimizer, model = (sum(f.stat().st_size for f in path.glob(f"*{kind}_states.pt")) for kind in ("optim", "model"))
    return 2 * optimizer + model


def _convert(path: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as plain, redirect_stdout(StringIO()):
        # DeepSpeed takes paths for patterns: a link keeps away what would mean something else in one
        link = Path(plain) / "checkpoints"
        link.symlink_to(path.parent.absolute())
        ds_to_universal.main(
            Namespace(
                input_folder=str(link / path.name),
                output_folder=str(link / folder.name / path.name),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    # every rank loads this one whole; of ZeRO-3 it has all of a rank's shard, which nothing reads
    common = folder / path.name / "zero" / "optimizer_state.pt"
    torch.save(_without_tensors(unpickling.load(common)), common)


def _without_tensors(state: Any) -> Any:
    """Numbers stay, whatever they are in."""
    if isinstance(state, dict):
        return {key: _without_tensors(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_without_tensors(value) for value in state]
    return None if isinstance(state, torch.Tensor) and state.numel() != 1 else state
