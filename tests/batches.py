"""Make batches from lists of token ids, for tests that need no files."""

from __future__ import annotations

import numpy as np

from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.samples import Sample


def sample(prompt: list[int], response: list[int], sample_id: int = 0) -> Sample:
    """Return a sample; each response token but the last may be replaced."""
    ids = [*prompt, *response]
    turns = np.array([[len(prompt), len(ids) - 1, len(ids)]])
    return Sample(sample_id=sample_id, input_ids=np.array(ids), turns=turns)


def padded(prompts: list[list[int]], responses: list[list[int]], sample_ids: list[int]) -> TokenBatch:
    """Return a batch with one sample per row."""
    return collate([[sample(*values)] for values in zip(prompts, responses, sample_ids, strict=True)])


def lengths(batch: TokenBatch) -> list[int]:
    """Return the number of real tokens of each row."""
    return (batch.sample_ids >= 0).sum(dim=1).tolist()
