"""Training rows -> the micro-batches of each optimizer step.

A row of a batch holds one sample, or several samples that are packed. Rows are padded on the right: under causal
attention no real token sees the padding, so that no attention mask is needed. The model tells packed samples apart by
their positions. `sample_ids` says which positions are real. Token ids cannot, because a drawn token may have any id.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import datasets
import numpy as np
import torch
from torch import Tensor

from selfgen_ds.data.order import Stream
from selfgen_ds.data.row import ARRAYS, TrainingRow

_GROUPED_STEPS = 50
"""Steps of a group, within which `group_by_length` sorts the rows."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """One micro-batch: a padded stack of training rows.

    All tensors are `[batch, length]` and aligned position by position, without a shift. They have the names
    of the arrays of a `TrainingRow`. They stay on the host: a forward takes what it reads to the device.
    """

    sample_ids: Tensor
    """`[batch, length]` int64: the sample that a token belongs to, -1 for padding."""
    position_ids: Tensor
    """`[batch, length]` int64: the position of a token in its sample."""
    context_ids: Tensor
    """`[batch, length]` int64: the tokens that the model reads."""
    target_ids: Tensor
    """`[batch, length]` int64: the reference, whatever the context."""
    loss_mask: Tensor
    """`[batch, length]` bool: response tokens. Never a sample's first token."""
    replaceable_mask: Tensor
    """`[batch, length]` bool: response tokens that a draw may replace."""
    replaced_mask: Tensor
    """`[batch, length]` bool: where the context holds a token that the model drew."""
    packed: bool
    """Whether rows may hold several samples."""

    @property
    def packed_position_ids(self) -> Tensor | None:
        """The positions that tell a model where packed samples start; None without packing, when the model counts."""
        return self.position_ids if self.packed else None


def collate(rows: Sequence[Sequence[TrainingRow]], *, packed: bool = False) -> TokenBatch:
    """Stack rows into one micro-batch: each row holds one sample, or several that are packed, padded on the right.

    Without any row, the batch is two padding tokens that have no target: a rank that has run out of rows must still
    make the same collective calls as the other ranks, and a model cannot read a batch without tokens.
    """
    length = max((sum(map(len, samples)) for samples in rows), default=2)
    shape = (max(1, len(rows)), length)
    arrays: dict[str, np.ndarray] = {
        name: np.zeros(shape, np.int64 if name.endswith("ids") else bool) for name in ARRAYS
    }
    sample_ids, position_ids = np.full(shape, -1), np.zeros(shape, np.int64)
    for number, samples in enumerate(rows):
        end = 0
        for sample in samples:
            start, end = end, end + len(sample)
            for name, array in arrays.items():
                array[number, start:end] = getattr(sample, name)
            sample_ids[number, start:end] = sample.sample_id
            position_ids[number, start:end] = np.arange(len(sample))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return TokenBatch(
        sample_ids=torch.from_numpy(sample_ids), position_ids=torch.from_numpy(position_ids), packed=packed, **tensors
    )


class Rows(Protocol):
    """The rows of one source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TrainingRow: ...

    def lengths(self, indices: np.ndarray, /) -> np.ndarray:
        """Return the tokens of some rows: int64."""
        ...


@dataclass(kw_only=True, eq=False)
class StepBatches:
    """Deals the training rows out to optimizer steps and ranks, as one endless stream.

    Step s takes the next `step_size` rows of the stream, so that any step can be computed without the steps before it.
    The rows are dealt out micro-batch by micro-batch, to each rank in turn. If they do not divide evenly, the last
    micro-batches of some ranks are short or have no row. A run of whole epochs ends with a step as short as the rows
    that are left.
    """

    samples: Sequence[Rows] = field(kw_only=False)
    """The rows of each source."""
    seed: int
    step_size: int
    """Rows of one optimizer step, over all ranks."""
    micro_batch_size: int
    rank: int
    world_size: int
    epochs: float | None
    """Length of the run; None for a run without an end."""
    packs: Sequence[datasets.Dataset] | None = None
    """For each source, the packed rows (`selfgen_ds.data.packing`); None means one sample per row."""
    weights: Sequence[float] | None = None
    """Shares of the sources (`Stream`)."""
    group_by_length: bool = False
    """Sort the rows of 50 steps by length before they are dealt out, so that a step has rows of similar length; the 50
    steps are then shuffled."""

    def __post_init__(self) -> None:
        self._stream = Stream([len(source) for source in self.packs or self.samples], self.weights, self.seed)
        self._epoch_size = self._stream.size
        self._shift = 0  # added to a position of the run to get the position in the stream
        self._steps: range | None = None  # the steps that groups by length are confined to
        self._end = None if self.epochs is None else round(self.epochs * len(self))
        self._grouped: tuple[int, np.ndarray] | None = None

    def with_rows(self, rows: Sequence[Rows], steps: range) -> StepBatches:
        """Return the batches of some steps over other rows, which take the place of the samples.

        If the rows are as many as the samples, they come in the order of the samples. If they are fewer or more, an
        epoch is shorter or longer, but the run is not.

        Args:
            rows: The rows of each source.
        """
        other = copy.copy(self)
        sizes = [len(source) for source in self.packs or rows]
        other.samples, other._grouped = rows, None
        other._stream = Stream(sizes, self.weights, self.seed, least=0)  # few rows of a round are no error
        first = steps.start * self.step_size
        if other._stream.size != len(self):
            # A round starts with a whole epoch of its rows, which is not the epoch of the round before.
            other._shift = first // len(self) * other._stream.size - first
        if self.group_by_length and not all(map(_same_lengths, self.samples, rows)):
            other._steps = steps  # the rows of other steps have other lengths, so that a group must not reach there
        return other

    def __len__(self) -> int:
        """Return the rows of one epoch."""
        return self._epoch_size

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank in one optimizer step."""
        return -(-self.step_size // (self.world_size * self.micro_batch_size))

    def steps(self) -> int:
        """Return the optimizer steps of a run of `epochs`."""
        assert self._end is not None
        return -(-self._end // self.step_size)

    def epoch(self, step: int) -> float:
        """Return the epochs done after a number of optimizer steps."""
        return min(step * self.step_size, self._end or float("inf")) / len(self)

    def at(self, step: int) -> list[TokenBatch]:
        """Return this rank's micro-batches of one optimizer step (from 0)."""
        positions = self._positions(step)
        batches = []
        for number in range(self.accumulation):
            first = (number * self.world_size + self.rank) * self.micro_batch_size
            numbers = self._stream.at(positions[first : first + self.micro_batch_size])
            rows = [self._row(source, row) for source, row in numbers.tolist()]
            batches.append(collate(rows, packed=self.packs is not None))
        return batches

    def _row(self, source: int, number: int) -> list[TrainingRow]:
        members = [number] if self.packs is None else self.packs[source][number]["indices"]
        return [self.samples[source][member] for member in members]

    def _positions(self, step: int) -> np.ndarray:
        """Return the positions in the stream of the rows of one optimizer step, over all ranks."""
        if not self.group_by_length:
            return self._range(step, step + 1)
        start = self._steps.start if self._steps else 0
        group, offset = divmod(step - start, _GROUPED_STEPS)
        if self._grouped is None or self._grouped[0] != group:
            self._grouped = (group, self._sorted_by_length(start + group * _GROUPED_STEPS))
        return self._grouped[1][offset * self.step_size : (offset + 1) * self.step_size]

    def _range(self, first_step: int, end_step: int) -> np.ndarray:
        """Return the positions in the stream of some steps, in the order of the stream."""
        first, end = first_step * self.step_size, end_step * self.step_size
        return self._shift + np.arange(first, end if self._end is None else min(end, self._end))

    def _sorted_by_length(self, step: int) -> np.ndarray:
        """Return the positions of a group of steps: similar lengths in each step, the steps in random order."""
        end = step + _GROUPED_STEPS
        positions = self._range(step, min(end, self._steps.stop) if self._steps else end)
        rows = self._stream.at(positions)
        lengths = np.empty(len(rows), dtype=np.int64)
        for source, samples in enumerate(self.samples):
            here = rows[:, 0] == source
            lengths[here] = samples.lengths(rows[here, 1])
        positions = positions[np.argsort(lengths, kind="stable")]
        whole = len(positions) // self.step_size * self.step_size  # a short last step stays last
        steps = positions[:whole].reshape(-1, self.step_size)
        order = np.random.default_rng((self.seed, step // _GROUPED_STEPS)).permutation(len(steps))
        return np.concatenate([steps[order].ravel(), positions[whole:]])


def _same_lengths(some: Rows, others: Rows) -> bool:
    """Return whether two sources have as many rows, each of the same length."""
    if len(some) != len(others):
        return False
    rows = np.arange(len(some))
    return np.array_equal(some.lengths(rows), others.lengths(rows))
