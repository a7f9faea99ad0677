"""One row of a round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selfgen_ds.data.samples import Sample


@dataclass(frozen=True, kw_only=True)
class StoredRow:
    """One row of a round. All arrays are `[length]`, aligned position by position, without a shift."""

    sample_id: int
    context_ids: np.ndarray
    """int64: what the model reads."""
    target_ids: np.ndarray
    """int64: the reference where there is a loss."""
    loss_mask: np.ndarray
    """bool: response tokens of the reference."""
    replaced_mask: np.ndarray
    """bool: where the context holds what the model drew."""
    answer_equal: bool = False
    """Whether the model's own answer is the reference."""

    @staticmethod
    def of(sample: Sample) -> StoredRow:
        """Teacher forcing on a sample."""
        loss_mask = np.zeros(len(sample.input_ids), bool)
        for start, _, end in sample.turns:
            loss_mask[start:end] = True
        return StoredRow(
            sample_id=sample.sample_id,
            context_ids=sample.input_ids,
            target_ids=sample.input_ids,
            loss_mask=loss_mask,
            replaced_mask=np.zeros(len(sample.input_ids), bool),
        )

    def sample(self) -> Sample:
        """What is trained on. Nothing of it is replaced any more."""
        edges = np.flatnonzero(np.diff(np.pad(self.loss_mask.astype(np.int8), 1))).reshape(-1, 2)
        return Sample(
            sample_id=self.sample_id,
            input_ids=self.target_ids,
            turns=edges[:, [0, 0, 1]],
            context_ids=self.context_ids,
            drawn=self.replaced_mask,
        )
