"""A journal of an evaluation: the scores of the batches that are done, so that a later start goes on after them."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from selfgen_ds.data.row import TrainingRow
from selfgen_ds.evaluation.metrics import SampleScore
from selfgen_ds.files import naming, write_atomically
from selfgen_ds.ranks import process_group

log = logging.getLogger("selfgen_ds")


class Journal:
    """The scores of an evaluation so far, in a file that rank 0 writes batch by batch.

    Collective: every rank must make one, because rank 0 reads the file for all ranks.

    Args:
        key: Checksum of what the scores depend on. A file with another key is written anew.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self.scores: dict[int, SampleScore] = {}
        """Sample id -> scores that an earlier start has left; on rank 0."""
        done = process_group.from_rank_0(self._read) if dist.is_initialized() else self._read()
        self.done: set[int] = done
        """Sample ids of these scores."""

    def _read(self) -> set[int]:
        """Read the file, and write it anew without a line that an earlier process did not finish."""
        key, *lines = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]
        if key and key != self._key.encode():
            log.warning(
                "%s is of other options, files or another version; it is kept as %s.old", self._path, self._path
            )
            self._path.rename(f"{self._path}.old")
        for line in lines if key == self._key.encode() else []:
            with suppress(ValueError, TypeError):
                score = SampleScore(**json.loads(line))
                self.scores[score.sample_id] = score
        write_atomically(self._path, "".join(f"{line}\n" for line in [self._key, *map(_line, self.scores.values())]))
        return set(self.scores)

    def kept(self, shares: list[list[TrainingRow]]) -> list[SampleScore] | None:
        """Return the scores of a batch, given as the rows of every rank, if all of them are here.

        Returns:
            None if they are not; nothing on other ranks than rank 0.
        """
        ids = [sample.sample_id for share in shares for sample in share]
        return [self.scores[i] for i in ids if i in self.scores] if self.done.issuperset(ids) else None

    def keep(self, scores: list[SampleScore]) -> None:
        """Write the scores of a batch."""
        if process_group.rank() != 0:
            return
        with naming(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.writelines(f"{_line(score)}\n" for score in scores)
            file.flush()
            os.fsync(file.fileno())


def _line(score: SampleScore) -> str:
    return json.dumps(asdict(score), ensure_ascii=False)
