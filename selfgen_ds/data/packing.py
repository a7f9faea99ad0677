"""Packing: the choice of samples that share a training row, so that rows are nearly full."""

from __future__ import annotations

import zlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock

from selfgen_ds.data import order
from selfgen_ds.data.samples import Samples
from selfgen_ds.files import naming

_POOL = 10_000  # samples that are packed together; a larger pool would not fill rows better


def load_packs(samples: Samples, max_length: int) -> datasets.Dataset:
    """Return the packed rows of a source: a memory-mapped table whose column `indices` lists the samples of each row.

    The rows are packed once, from the samples in shuffled order, and kept beside the samples in the cache. They are the
    same in every epoch and every run.
    """
    # The file's name holds a hash of the code, because other code would pack the same samples into other rows.
    code = zlib.crc32(b"".join(Path(module).read_bytes() for module in (__file__, order.__file__)))
    path = samples.folder / f"packs-{code:08x}.arrow"
    features = datasets.Features({"indices": datasets.List(datasets.Value("int64"))})
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            partial = path.with_suffix(".partial")
            with naming(partial), ArrowWriter(features=features, path=str(partial), writer_batch_size=1000) as writer:
                for first in range(0, len(samples), _POOL):
                    pool = order.permute(np.arange(first, min(first + _POOL, len(samples))), len(samples), 0)
                    packs = pack(samples.lengths(pool), max_length)
                    writer.write_batch({"indices": [pool[members].tolist() for members in packs]})
            partial.rename(path)
    return datasets.Dataset.from_file(str(path))


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Pack samples into rows by best-fit decreasing.

    The longest sample is placed first. Each sample goes into the fullest row that has room for it.

    Args:
        lengths: `[samples]` tokens, each at most `capacity`.
        capacity: Tokens that a row can hold.

    Returns:
        One list per row of the samples' numbers.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), ascending
    for sample in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[sample])
        index = bisect_left(rooms, (length, -1))
        if index == len(rooms):
            rows.append([])
            room, row = capacity, len(rows) - 1
        else:
            room, row = rooms.pop(index)
        rows[row].append(sample)
        if room > length:
            insort(rooms, (room - length, row))
    return rows
