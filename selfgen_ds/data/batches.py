"""Samples -> the windows of micro-batches that the trainer steps through.

Shapes: B rows of a micro-batch, L positions. Rows are padded on the right; under causal attention no real
token sees the padding, so no attention mask is needed, and which positions are real is told by lengths,
never by token ids (a drawn token may be any id).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from selfgen_ds.data.samples import Samples


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """One micro-batch. All `[B, L]` tensors are aligned position by position, without a shift."""

    sample_ids: Tensor
    """`[B]` int64: the row's number in its source."""
    lengths: Tensor
    """`[B]` int64: real tokens of each row."""
    context: Tensor
    """`[B, L]` int64: what the model reads."""
    target: Tensor
    """`[B, L]` int64: the reference, whatever the context."""
    loss_mask: Tensor
    """`[B, L]` bool: response tokens. Never position 0."""
    replaceable: Tensor
    """`[B, L]` bool: response tokens that a draw may replace: all but the last of a row."""
    drawn: Tensor
    """`[B, L]` bool: where the context holds a drawn token."""

    def to(self, device: torch.device | str) -> TokenBatch:
        return TokenBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def collate(prompts: list[list[int]], responses: list[list[int]], sample_ids: list[int]) -> TokenBatch:
    """Pad prompt + response rows to a micro-batch.

    Without any row it is two padding tokens without a target, so that a rank that has run out of rows still
    makes the same collective calls as the others.
    """
    if not sample_ids:
        prompts, responses, sample_ids = [[0, 0]], [[]], [-1]
    prompt_lengths = torch.tensor([len(p) for p in prompts])
    lengths = prompt_lengths + torch.tensor([len(r) for r in responses])
    reference = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        reference[row, : lengths[row]] = torch.tensor(prompt + response)
    positions = torch.arange(reference.shape[1])
    response_mask = (positions >= prompt_lengths[:, None]) & (positions < lengths[:, None])
    return TokenBatch(
        sample_ids=torch.tensor(sample_ids),
        lengths=lengths,
        context=reference,
        target=reference,
        loss_mask=response_mask,
        replaceable=response_mask & (positions < lengths[:, None] - 1),
        drawn=torch.zeros_like(response_mask),
    )


class Windows:
    """The training rows as one endless stream, cut into optimizer steps.

    The stream is epoch after epoch, each a permutation by (seed, epoch) alone. Step s takes the next
    `world_size * micro_batch_size * accumulation` rows, so any step can be had without the ones before it. A
    run of whole epochs ends with a step that is as short as the rows that are left.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        seed: int,
        micro_batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        epochs: float | None,
    ) -> None:
        self._rows = samples.rows
        self._seed = seed
        self._micro_batch_size = micro_batch_size
        self._accumulation = accumulation
        self._rank, self._world_size = rank, world_size
        self._end = None if epochs is None else round(epochs * len(samples))
        self._order: tuple[int, np.ndarray] | None = None

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
        return min(step * self.step_size, self._end or float("inf")) / len(self._rows)

    def window(self, step: int) -> list[TokenBatch]:
        """This rank's micro-batches of one optimizer step (from 0)."""
        return list(self._micro_batches(step))

    def _micro_batches(self, step: int) -> Iterator[TokenBatch]:
        for micro in range(self._accumulation):
            first = step * self.step_size + (micro * self._world_size + self._rank) * self._micro_batch_size
            positions = range(first, first + self._micro_batch_size)
            indices = [self._row(p) for p in positions if self._end is None or p < self._end]
            rows = [self._rows[i] for i in indices]
            yield collate(
                [r["prompt_ids"] for r in rows],
                [r["response_ids"] for r in rows],
                [r["sample_id"] for r in rows],
            )

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._rows))
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._rows))
            self._order = (epoch, order)
        return int(self._order[1][offset])
