"""Remove checkpoints that need not stay on the disk."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from selfgen_ds.checkpoint.manifest import MARKER, best_of, half_written
from selfgen_ds.checkpoint.storage import Storage

log = logging.getLogger("selfgen_ds")


def retain(folder: Path, keep: int, metric: str, storage: Storage) -> None:
    """Remove all but the newest `keep` complete checkpoints and the best one by `metric`.

    A complete checkpoint has been read back from the disk before it was marked as complete. Folders that a killed run
    left half-written are removed too; broken checkpoints stay, for somebody to look at. Collective: every rank must
    call this.
    """
    complete = storage.complete(folder)
    if storage.writes:
        best = best_of(complete, metric)
        remove_all([checkpoint.path for checkpoint in complete[:-keep] if checkpoint != best] + half_written(folder))


def remove_all(paths: list[Path]) -> None:
    """Remove checkpoints; one that cannot be removed is left to the next call."""
    for path in paths:
        try:
            remove(path)
        except OSError as error:  # for example a file that somebody has open, over NFS
            log.warning("%s cannot be removed now (%s); trying again after the next checkpoint", path, error)


def remove(path: Path) -> None:
    """Remove a checkpoint. Its manifest goes first, so that a half-removed checkpoint never looks complete."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)
