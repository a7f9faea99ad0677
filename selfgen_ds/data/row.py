"""One training row: the context, the target, and masks of the tokens that are learned, replaceable, or replaced.

The tokenized data set gives such rows, a round writes and reads them, and a batch is a padded stack of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

ARRAYS = ("context_ids", "target_ids", "loss_mask", "replaceable_mask", "replaced_mask")
"""The arrays of a row: ids are int64, masks are bool."""


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One row of tokens. All arrays are `[length]` and aligned position by position, without a shift.

    The fields have the names of the columns of a round (`rollouts/round-01/`) and of the tensors of a `TokenBatch`.
    """

    sample_id: int
    """Number of the row in the data set, from 0; the numbers of a later source continue after those of the
    sources before it."""
    context_ids: np.ndarray
    """int64: the tokens that the model reads."""
    target_ids: np.ndarray
    """int64: the reference, whatever the context; the model learns it where `loss_mask` is true."""
    loss_mask: np.ndarray
    """bool: the response tokens of the reference. Never the first token: nothing predicts it."""
    replaceable_mask: np.ndarray
    """bool: response tokens that a draw may replace: no token that closes a turn, and never the row's last token."""
    replaced_mask: np.ndarray
    """bool: where the context holds a token that the model drew."""
    answer_equal: bool = False
    """Rounds: whether the answer that the model drew has the text of the reference."""
    response_start: int | None = None
    """Where the last response starts; by default at the start of the last run of `loss_mask`. A chat template can
    write learned tokens directly before a response, so that the run starts earlier."""

    @staticmethod
    def reference(sample_id: int, ids: np.ndarray, turns: np.ndarray) -> TrainingRow:
        """Return the row of teacher forcing: the context is the reference.

        Args:
            ids: `[length]` int64.
            turns: `[turns, 3]` int: where a response starts, where its replaceable part ends, and where it ends.
        """
        loss_mask, replaceable_mask = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
        for start, replaceable_end, end in turns:
            loss_mask[start:end] = True
            replaceable_mask[start:replaceable_end] = True
        return TrainingRow(
            sample_id=sample_id,
            context_ids=ids,
            target_ids=ids,
            loss_mask=loss_mask,
            replaceable_mask=replaceable_mask,
            replaced_mask=np.zeros(len(ids), bool),
            response_start=int(turns[-1, 0]),
        )

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.context_ids)

    @property
    def prompt_ids(self) -> np.ndarray:
        """Tokens of the reference before the last response: int64."""
        return self.target_ids[: self._response.start]

    @property
    def response_ids(self) -> np.ndarray:
        """Tokens of the last response of the reference: int64."""
        return self.target_ids[self._response]

    @property
    def _response(self) -> slice:
        edges = np.flatnonzero(np.diff(self.loss_mask, prepend=False, append=False))
        start = edges[-2] if self.response_start is None else self.response_start
        return slice(int(start), int(edges[-1]))


class RowReader:
    """Reads single rows of a table, which stays memory-mapped.

    `table[index]` gives the same, but its formatter takes a tenth of a small step.
    """

    def __init__(self, table: datasets.Dataset) -> None:
        self._batches = table.data.table.to_batches()
        self._ends = np.cumsum([len(batch) for batch in self._batches])
        self._opened: dict[int, dict[str, _Column]] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the columns of one row: lists as int64 or bool arrays, other values as Python's."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[number]
        if number not in self._opened:
            columns = zip(batch.schema.names, batch.columns, strict=True)
            self._opened[number] = {name: _Column.of(column) for name, column in columns}
        row = index - int(self._ends[number]) + len(batch)
        return {name: column[row] for name, column in self._opened[number].items()}


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A column of a batch of rows."""

    values: np.ndarray | pa.Array
    """The values of all rows, one after another: a view of the file, but for bits, which have no view."""
    ends: np.ndarray | None
    """`[rows + 1]`: where the list of each row ends; None for a column of single values."""

    @staticmethod
    def of(column: pa.Array) -> _Column:
        if not pa.types.is_list(column.type):
            return _Column(values=column, ends=None)
        values = column.values if pa.types.is_boolean(column.type.value_type) else column.values.to_numpy()
        return _Column(values=values, ends=column.offsets.to_numpy())

    def __getitem__(self, row: int) -> Any:
        if self.ends is None:
            return self.values[row].as_py()
        values = self.values[self.ends[row] : self.ends[row + 1]]
        return values.astype(np.int64) if isinstance(values, np.ndarray) else values.to_numpy(zero_copy_only=False)
