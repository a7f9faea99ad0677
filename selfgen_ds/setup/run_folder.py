"""A run's output folder: checked, locked, and searched for the checkpoint that the run resumes from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from selfgen_ds.checkpoint import manifest, resuming
from selfgen_ds.checkpoint.storage import Storage, detect_storage
from selfgen_ds.config import Recipe
from selfgen_ds.errors import Problems
from selfgen_ds.files import lock, make_folder
from selfgen_ds.ranks.agreement import raise_on_all_ranks
from selfgen_ds.validation.output_folder import check_nothing_overwritten, check_same_run

log = logging.getLogger("selfgen_ds")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run's output folder, which no other run writes to while this object lives."""

    path: Path
    storage: Storage
    resumed: manifest.Checkpoint | None
    """The checkpoint that the run resumes from; None if the run starts from the beginning."""
    lock: IO[str] | None
    """The open lock file on the ranks that write to the folder; closing the file releases the lock."""

    @property
    def first_step(self) -> int:
        """Optimizer steps already done."""
        return self.resumed.step if self.resumed else 0


def open_run_folder(recipe: Recipe, json_config: dict[str, Any]) -> RunFolder:
    """Check and lock the output folder, and find the newest intact checkpoint in it.

    Collective: every rank must call this, because the ranks find out together whether their hosts share the folder.

    Raises:
        InputError: The folder belongs to another run, cannot be written to, or holds no checkpoint that can be resumed.
    """
    path, rank, lock_file = Path(recipe.output_dir), dist.get_rank(), None
    with raise_on_all_ranks():
        if rank == 0:
            lock_file = _check_and_lock(recipe, json_config)
    storage = detect_storage(path)
    if not storage.shared:
        log.info("hosts do not share %s: each keeps the part of the checkpoints that its ranks write", path)
    with raise_on_all_ranks():
        if storage.writes and rank != 0:
            lock_file = _check_and_lock(recipe, json_config)
    resumed = None
    if recipe.resume == "auto":
        resumed = resuming.find(path / "checkpoints", storage)
        with raise_on_all_ranks():
            if resumed is None and storage.writes:
                problems = Problems()
                check_nothing_overwritten(problems, recipe)
                problems.raise_all()
    return RunFolder(path=path, storage=storage, resumed=resumed, lock=lock_file)


def _check_and_lock(recipe: Recipe, json_config: dict[str, Any]) -> IO[str]:
    """Lock the output folder, then check it: `prepare` may have checked it before, but another run could change it."""
    folder = Path(recipe.output_dir)
    make_folder(folder, "output_dir")
    lock_file = lock(folder, "output_dir")
    problems = Problems()
    check_same_run(problems, recipe, json_config)
    problems.raise_all()
    return lock_file
