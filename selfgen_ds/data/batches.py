"""Samples -> the windows of micro-batches that the trainer steps through.

Shapes: B rows of a micro-batch, L positions. A row is one sample, or several of them packed. Rows are padded on the
right; under causal attention no real token sees the padding, so no attention mask is needed, and packed samples are
told apart by their positions. Which positions are real is told by `sample_ids`, never by token ids (a drawn token
may be any id).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import datasets
import numpy as np
import torch
from torch import Tensor

from selfgen_ds.data.order import Stream
from selfgen_ds.data.samples import Sample

_GROUPED_STEPS = 50  # steps whose rows are sorted by length among themselves


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """One micro-batch. All `[B, L]` tensors are aligned position by position, without a shift."""

    sample_ids: Tensor
    """`[B, L]` int64: the sample that a token belongs to, -1 for padding."""
    position_ids: Tensor
    """`[B, L]` int64: the token's position in its sample."""
    context: Tensor
    """`[B, L]` int64: what the model reads."""
    target: Tensor
    """`[B, L]` int64: the reference, whatever the context."""
    loss_mask: Tensor
    """`[B, L]` bool: response tokens. Never a sample's first token."""
    replaceable: Tensor
    """`[B, L]` bool: response tokens that a draw may replace: not what closes a turn, nor a sample's last token."""
    drawn: Tensor
    """`[B, L]` bool: where the context holds a drawn token."""
    packed: bool
    """Whether rows may hold several samples."""

    @property
    def packed_position_ids(self) -> Tensor | None:
        """What tells a model where packed samples start; without packing it counts by itself."""
        return self.position_ids if self.packed else None

    def to(self, device: torch.device | str) -> TokenBatch:
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "packed"}
        return TokenBatch(packed=self.packed, **tensors)


def collate(rows: Sequence[Sequence[Sample]], *, packed: bool = False) -> TokenBatch:
    """Rows of samples, padded to a micro-batch.

    Without any row it is two padding tokens without a target, so that a rank that has run out of rows still
    makes the same collective calls as the others.
    """
    length = max((sum(len(sample.input_ids) for sample in row) for row in rows), default=2)
    shape = (max(1, len(rows)), length)
    context, target = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    sample_ids, position_ids = np.full(shape, -1), np.zeros(shape, np.int64)
    loss_mask, replaceable, drawn = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
    for number, row in enumerate(rows):
        first = 0
        for sample in row:
            here = slice(first, first + len(sample.input_ids))
            target[number, here] = sample.input_ids
            context[number, here] = sample.input_ids if sample.context_ids is None else sample.context_ids
            drawn[number, here] = False if sample.drawn is None else sample.drawn
            sample_ids[number, here] = sample.sample_id
            position_ids[number, here] = np.arange(len(sample.input_ids))
            for start, replaceable_end, end in first + sample.turns:
                loss_mask[number, start:end] = True
                replaceable[number, start:replaceable_end] = True
            first = here.stop
    return TokenBatch(
        sample_ids=torch.from_numpy(sample_ids),
        position_ids=torch.from_numpy(position_ids),
        context=torch.from_numpy(context),
        target=torch.from_numpy(target),
        loss_mask=torch.from_numpy(loss_mask),
        replaceable=torch.from_numpy(replaceable),
        drawn=torch.from_numpy(drawn),
        packed=packed,
    )


class Rows(Protocol):
    """The rows of one source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def lengths(self, indices: np.ndarray, /) -> np.ndarray:
        """Tokens of some rows: int64."""
        ...


class StepBatches:
    """The training rows as one endless stream, cut into optimizer steps.

    Step s takes the next `step_size` rows of the stream, so any step can be had without the ones before it. They are
    dealt out micro-batch by micro-batch, each rank its own in turn; where they do not divide, some ranks' last ones
    are empty. A run of whole epochs ends with a step that is as short as the rows that are left.

    Args:
        samples: By source.
        step_size: Rows an optimizer step takes, over all ranks.
        packs: The rows of every source that samples are packed into; none means a sample a row.
        weights: Shares of the sources, or None.
        group_by_length: Sort the rows of 50 steps by length and deal them out step by step, so that rows of similar
            length share one; the steps are shuffled.
    """

    def __init__(
        self,
        samples: Sequence[Rows],
        *,
        seed: int,
        step_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        epochs: float | None,
        packs: Sequence[datasets.Dataset] | None = None,
        weights: Sequence[float] | None = None,
        group_by_length: bool = False,
    ) -> None:
        self._samples = samples
        self._packs = packs
        self._weights, self._seed = weights, seed
        self._stream = Stream([len(source) for source in packs or samples], weights, seed)
        self._epoch_size = self._stream.size
        self._shift = 0  # from a run's positions to those in the stream
        self._steps: range | None = None  # that rows are sorted in
        self.step_size = step_size
        self._micro_batch_size = micro_batch_size
        self._rank, self._world_size = rank, world_size
        self._end = None if epochs is None else round(epochs * len(self))
        self._group_by_length = group_by_length
        self._grouped: tuple[int, np.ndarray] | None = None

    def over(self, rows: Sequence[Rows], steps: range) -> StepBatches:
        """Some steps over other rows in the place of the samples, one `Rows` a source.

        As many rows come in the same order. Of fewer or more, an epoch is shorter or longer, but not the run.
        """
        other = copy.copy(self)
        sizes = [len(source) for source in self._packs or rows]
        other._samples, other._grouped = rows, None
        other._stream = Stream(sizes, self._weights, self._seed, least=0)  # what a round draws is no error
        first = steps.start * self.step_size
        if other._stream.size != len(self):  # starts with a whole epoch of its own, the next one in every round
            other._shift = first // len(self) * other._stream.size - first
        if self._group_by_length and not all(map(_same_lengths, self._samples, rows)):
            other._steps = steps  # groups that reached out of them would be sorted differently there
        return other

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._epoch_size

    @property
    def accumulation(self) -> int:
        """Micro-batches of every rank in an optimizer step."""
        return -(-self.step_size // (self._world_size * self._micro_batch_size))

    def steps(self) -> int:
        """Optimizer steps of a run of `epochs`."""
        assert self._end is not None
        return -(-self._end // self.step_size)

    def epoch(self, step: int) -> float:
        """Epochs done after so many optimizer steps."""
        return min(step * self.step_size, self._end or float("inf")) / len(self)

    def window(self, step: int) -> list[TokenBatch]:
        """This rank's micro-batches of one optimizer step (from 0)."""
        return list(self._micro_batches(step))

    def _micro_batches(self, step: int) -> Iterator[TokenBatch]:
        positions = self._positions(step)
        for micro in range(self.accumulation):
            first = (micro * self._world_size + self._rank) * self._micro_batch_size
            places = self._stream.at(positions[first : first + self._micro_batch_size])
            yield collate(
                [self._row(source, number) for source, number in places.tolist()], packed=self._packs is not None
            )

    def _row(self, source: int, number: int) -> list[Sample]:
        members = [number] if self._packs is None else self._packs[source][number]["indices"]
        return [self._samples[source][member] for member in members]

    def _positions(self, step: int) -> np.ndarray:
        """Positions in the stream of one optimizer step's rows, over all ranks."""
        if not self._group_by_length:
            return self._range(step, step + 1)
        start = self._steps.start if self._steps else 0
        group, offset = divmod(step - start, _GROUPED_STEPS)
        if self._grouped is None or self._grouped[0] != group:
            self._grouped = (group, self._sorted_by_length(start + group * _GROUPED_STEPS))
        return self._grouped[1][offset * self.step_size : (offset + 1) * self.step_size]

    def _range(self, step: int, behind: int) -> np.ndarray:
        first, end = step * self.step_size, behind * self.step_size
        return self._shift + np.arange(first, end if self._end is None else min(end, self._end))

    def _sorted_by_length(self, step: int) -> np.ndarray:
        behind = step + _GROUPED_STEPS
        positions = self._range(step, min(behind, self._steps.stop) if self._steps else behind)
        places = self._stream.at(positions)
        lengths = np.empty(len(places), dtype=np.int64)
        for source, samples in enumerate(self._samples):
            here = places[:, 0] == source
            lengths[here] = samples.lengths(places[here, 1])
        positions = positions[np.argsort(lengths, kind="stable")]
        whole = len(positions) // self.step_size * self.step_size  # a short last step stays the last
        steps = positions[:whole].reshape(-1, self.step_size)
        order = np.random.default_rng((self._seed, step // _GROUPED_STEPS)).permutation(len(steps))
        return np.concatenate([steps[order].ravel(), positions[whole:]])


def _same_lengths(some: Rows, others: Rows) -> bool:
    if len(some) != len(others):
        return False
    rows = np.arange(len(some))
    return np.array_equal(some.lengths(rows), others.lengths(rows))
