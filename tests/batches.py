"""Make batches from lists of token ids, for tests that need no files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest

from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.samples import Samples


@contextmanager
def samples_in(folder: Path) -> Iterator[None]:
    """Keep samples in a folder, and read each of them once inside: `datasets` takes half a millisecond per row."""
    known: dict[tuple[Path, int, int], TrainingRow] = {}
    read = Samples.__getitem__

    def remembered(samples: Samples, index: int) -> TrainingRow:
        key = samples.folder, samples.first_id, int(index)
        if key not in known:
            known[key] = read(samples, index)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(Samples, "__getitem__", remembered)
        yield


def sample(prompt: list[int], response: list[int], sample_id: int = 0) -> TrainingRow:
    """Return a sample; each response token but the last may be replaced."""
    ids = [*prompt, *response]
    return TrainingRow.reference(sample_id, np.array(ids), np.array([[len(prompt), len(ids) - 1, len(ids)]]))


def padded(prompts: list[list[int]], responses: list[list[int]], sample_ids: list[int]) -> TokenBatch:
    """Return a batch with one sample per row."""
    return collate([[sample(*values)] for values in zip(prompts, responses, sample_ids, strict=True)])


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return the start and the end of each run of true values in a `[length]` bool array."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def lengths(batch: TokenBatch) -> list[int]:
    """Return the number of real tokens of each row."""
    return (batch.sample_ids >= 0).sum(dim=1).tolist()
