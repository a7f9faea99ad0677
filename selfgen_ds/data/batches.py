"""Samples -> the windows of micro-batches that the trainer steps through.

Shapes: B rows of a micro-batch, L positions. A row is one sample, or several of them packed. Rows are padded on the
right; under causal attention no real token sees the padding, so no attention mask is needed, and packed samples are
told apart by their positions. Which positions are real is told by `sample_ids`, never by token ids (a drawn token
may be any id).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import datasets
import numpy as np
import torch
from torch import Tensor

from selfgen_ds.data.order import Stream
from selfgen_ds.data.samples import Sample, Samples

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
    reference, sample_ids, position_ids = np.zeros(shape, np.int64), np.full(shape, -1), np.zeros(shape, np.int64)
    loss_mask, replaceable = np.zeros(shape, bool), np.zeros(shape, bool)
    for number, row in enumerate(rows):
        first = 0
        for sample in row:
            here = slice(first, first + len(sample.input_ids))
            reference[number, here] = sample.input_ids
            sample_ids[number, here] = sample.sample_id
            position_ids[number, here] = np.arange(len(sample.input_ids))
            for start, replaceable_end, end in first + sample.turns:
                loss_mask[number, start:end] = True
                replaceable[number, start:replaceable_end] = True
            first = here.stop
    context = torch.from_numpy(reference)
    return TokenBatch(
        sample_ids=torch.from_numpy(sample_ids),
        position_ids=torch.from_numpy(position_ids),
        context=context,
        target=context,
        loss_mask=torch.from_numpy(loss_mask),
        replaceable=torch.from_numpy(replaceable),
        drawn=torch.zeros(shape, dtype=torch.bool),
        packed=packed,
    )


class Windows:
    """The training rows as one endless stream, cut into optimizer steps.

    Step s takes the next `world_size * micro_batch_size * accumulation` rows of the stream, so any step can be had
    without the ones before it. A run of whole epochs ends with a step that is as short as the rows that are left.

    Args:
        samples: By source.
        packs: The rows of every source that samples are packed into; none means a sample a row.
        weights: Shares of the sources, or None.
        group_by_length: Sort the rows of 50 steps by length and deal them out step by step, so that rows of similar
            length share one; the steps are shuffled.
    """

    def __init__(
        self,
        samples: Sequence[Samples],
        *,
        seed: int,
        micro_batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        epochs: float | None,
        packs: Sequence[datasets.Dataset] | None = None,
        weights: Sequence[float] | None = None,
        group_by_length: bool = False,
    ) -> None:
        self._samples = samples
        self._packs = packs
        self._first_ids = np.cumsum([0, *(source.read for source in samples)])
        self._stream = Stream([len(source) for source in packs or samples], weights, seed)
        self._seed = seed
        self._micro_batch_size = micro_batch_size
        self._accumulation = accumulation
        self._rank, self._world_size = rank, world_size
        self._end = None if epochs is None else round(epochs * len(self))
        self._group_by_length = group_by_length
        self._grouped: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._stream.size

    @property
    def step_size(self) -> int:
        """Rows an optimizer step takes, over all ranks."""
        return self._world_size * self._micro_batch_size * self._accumulation

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
        for micro in range(self._accumulation):
            first = (micro * self._world_size + self._rank) * self._micro_batch_size
            places = self._stream.at(positions[first : first + self._micro_batch_size])
            yield collate(
                [self._row(source, number) for source, number in places.tolist()], packed=self._packs is not None
            )

    def _row(self, source: int, number: int) -> list[Sample]:
        members = [number] if self._packs is None else self._packs[source][number]["indices"]
        samples = [self._samples[source][member] for member in members]
        return [replace(sample, sample_id=int(self._first_ids[source]) + sample.sample_id) for sample in samples]

    def _positions(self, step: int) -> np.ndarray:
        """Positions in the stream of one optimizer step's rows, over all ranks."""
        if not self._group_by_length:
            return self._range(step, 1)
        group, offset = divmod(step, _GROUPED_STEPS)
        if self._grouped is None or self._grouped[0] != group:
            self._grouped = (group, self._sorted_by_length(group))
        return self._grouped[1][offset * self.step_size : (offset + 1) * self.step_size]

    def _range(self, step: int, steps: int) -> np.ndarray:
        first, behind = step * self.step_size, (step + steps) * self.step_size
        return np.arange(first, behind if self._end is None else min(behind, self._end))

    def _sorted_by_length(self, group: int) -> np.ndarray:
        positions = self._range(group * _GROUPED_STEPS, _GROUPED_STEPS)
        places = self._stream.at(positions)
        lengths = np.empty(len(places), dtype=np.int64)
        for source, samples in enumerate(self._samples):
            here = places[:, 0] == source
            lengths[here] = samples.lengths(places[here, 1])
        positions = positions[np.argsort(lengths, kind="stable")]
        whole = len(positions) // self.step_size * self.step_size  # a short last step stays the last
        steps = positions[:whole].reshape(-1, self.step_size)
        order = np.random.default_rng((self._seed, group)).permutation(len(steps))
        return np.concatenate([steps[order].ravel(), positions[whole:]])
