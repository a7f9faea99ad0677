"""Convert a checkpoint to DeepSpeed's universal form, which any number of ranks can load.

DeepSpeed's conversion runs on rank 0, and its two long loops, over shards and over parameters, on all ranks of rank 0's
host: not in worker processes of their own, so that `unpickling.py` protects them too. The ranks of other hosts wait,
because a file system such as NFS may show them a folder in which files of the others are still missing.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
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
from selfgen_ds.ranks.agreement import raise_on_all_ranks

log = logging.getLogger("selfgen_ds")

FOLDER = "universal.partial"  # beside the checkpoints, under a name that is no checkpoint's


@contextmanager
def converted(engine: deepspeed.DeepSpeedEngine, path: Path) -> Iterator[Path]:
    """Convert the checkpoint at `path`; yield a folder that holds the result under the checkpoint's name.

    The folder is removed when all ranks have left the context. Collective: every rank must enter and leave it.

    Args:
        engine: The engine that will load the result.

    Raises:
        InputError: The disk has no room for the conversion, the engine cannot load the result, or a file holds more
            than plain data.
    """
    folder = path.parent / FOLDER
    problems = process_group.all_gather_object(_problem_of_groups(engine, path) or _problem_of_space(path))
    for problem in filter(None, problems):
        raise InputError(problem)
    log.info("converting %s for %d ranks, in %.1f MB of disk", path, dist.get_world_size(), _bytes_needed(path) / 1e6)
    started = time.perf_counter()
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            with _sharing_out():
                _convert(path, folder)
        else:
            _take_part()
    log.info("converted in %.1f s", time.perf_counter() - started)
    yield folder
    dist.barrier()  # all ranks have read the files
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def _problem_of_groups(engine: deepspeed.DeepSpeedEngine, path: Path) -> str | None:
    """Return a line if this rank has no element of some parameter group: DeepSpeed cannot load this below stage 3."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        return None
    groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    if all(any(parameter._hp_mapping is not None for parameter in group) for group in groups):
        return None
    return (
        f"resume: {path} cannot be loaded by {dist.get_world_size()} ranks: the model has too few norms and biases to "
        f"give every rank a part at ZeRO stage {stage}; start fewer ranks"
    )


def _problem_of_space(path: Path) -> str | None:
    need, free = _bytes_needed(path), shutil.disk_usage(path).free
    if need <= free:
        return None
    return (
        f"resume: {path} was written by another number of ranks; converting it takes {need / 1e6:,.1f} MB, and "
        f"{free / 1e6:,.1f} MB are free there"
    )


def _bytes_needed(path: Path) -> int:
    """Return the bytes of the optimizer's shards in pieces, of the pieces joined, and of a copy of the model states."""
    optimizer, model = (sum(f.stat().st_size for f in path.glob(f"*{kind}_states.pt")) for kind in ("optim", "model"))
    return 2 * optimizer + model


_Work = tuple[Callable[[Any], Any], list[Any], int]
"""What is done with each item, the items, and the number of ranks that share them, from rank 0 on."""


@contextmanager
def _sharing_out() -> Iterator[None]:
    """Let the long loops of DeepSpeed's conversion on rank 0 run on all ranks of its host.

    Collective: every other rank must call `_take_part` meanwhile.
    """

    alone = ds_to_universal._do_parallel_work

    def share_out(do: Callable[[Any], Any], items: Iterable[Any], _: int) -> list[Any]:
        work: _Work = do, list(items), process_group.local_world_size()
        return _own_part(process_group.from_rank_0(lambda: work))

    ds_to_universal._do_parallel_work = share_out
    try:
        yield
    finally:
        ds_to_universal._do_parallel_work = alone
        process_group.from_rank_0(lambda: None)


def _take_part() -> None:
    """Do this rank's part of each loop, until rank 0 has no more. Collective: every rank but rank 0 must call this."""
    nothing: _Work | None = None
    while (work := process_group.from_rank_0(lambda: nothing)) is not None:
        _own_part(work)


def _own_part(work: _Work) -> list[Any]:
    """Do this rank's part of a loop, and return the results of all ranks. An error is raised on rank 0 alone.

    Collective: every rank must call this.
    """
    do, items, ranks = work
    own = items[dist.get_rank() :: ranks] if dist.get_rank() < ranks else []
    error, results = None, list[Any]()
    try:
        results = [do(item) for item in own]
    except Exception as raised:
        error = raised
    gathered = process_group.all_gather_object((error, results))
    for error, _ in gathered if dist.get_rank() == 0 else ():
        if error is not None:
            raise error
    return [result for _, of_rank in gathered for result in of_rank]


def _convert(path: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as plain, redirect_stdout(StringIO()):
        # DeepSpeed uses paths as glob patterns; the link's path has no characters that mean something in a pattern.
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
    # Every rank loads this file. Under ZeRO-3 it also holds the tensors of one rank's shard, which nothing reads.
    common = folder / path.name / "zero" / "optimizer_state.pt"
    torch.save(_without_tensors(unpickling.load(common)), common)


def _without_tensors(state: Any) -> Any:
    """Replace tensors of more than one element by None, in nested containers."""
    if isinstance(state, dict):
        return {key: _without_tensors(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_without_tensors(value) for value in state]
    return None if isinstance(state, torch.Tensor) and state.numel() != 1 else state
