"""`noise`: a control. Tokens that the model did not choose stand where scheduled sampling has tokens of its own.

The model draws as in `scheduled_sampling`, and every drawn token that differs from the reference is then exchanged for
another token that differs from it, drawn from the unigram distribution of the responses or from all tokens alike. The
positions, and the number of differing tokens, are those of scheduled sampling; only the errors are not the model's. A
gain that this control has too is no gain from the model's own tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from selfgen_ds import hashing
from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.data.samples import Samples
from selfgen_ds.methods.method import Plan, Policy
from selfgen_ds.methods.mixture import MIXTURE
from selfgen_ds.methods.scheduled_sampling import ScheduledSampling

_ROWS_AT_ONCE = 1000  # whose tokens are counted together: a count is as long as the vocabulary


class Noise(ScheduledSampling):
    """Mixes noise into the contexts of every step; the target stays the reference."""

    settings: ClassVar[frozenset[str]] = MIXTURE | {"noise"}

    def __init__(self, config: SelfgenConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.frequencies = torch.ones(0, dtype=torch.float64)
        """`[V]` float64: how often each token is drawn; all tokens of the responses alike before `check`."""

    def check(self, samples: list[Samples]) -> None:
        counts = np.zeros(len(self.plan.tokenizer))
        for source in samples:
            for first in range(0, len(source), _ROWS_AT_ONCE):
                rows = range(first, min(first + _ROWS_AT_ONCE, len(source)))
                counts += np.bincount(np.concatenate([source[i].response_ids for i in rows]), minlength=len(counts))
        self.frequencies = torch.from_numpy((counts > 0).astype(float) if self.config.noise == "uniform" else counts)

    def contexts(self, batches: list[TokenBatch], policy: Policy, step: int) -> list[TokenBatch]:
        return [self._exchanged(batch, step) for batch in super().contexts(batches, policy, step)]

    def _exchanged(self, batch: TokenBatch, step: int) -> TokenBatch:
        differing = batch.replaced_mask & (batch.context_ids != batch.target_ids)
        targets = batch.target_ids[differing]
        keys = hashing.NOISE, self.plan.seed, step, batch.sample_ids[differing], batch.position_ids[differing]
        tokens = other_than(targets, self.frequencies, hashing.uniform(*keys))
        return replace(batch, context_ids=batch.context_ids.masked_scatter(differing, tokens))


def other_than(targets: Tensor, frequencies: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token for every target, by the frequencies of all tokens but the target.

    Args:
        targets: `[N]` int64.
        frequencies: `[V]` float64, of which at least two are above 0.
        uniforms: `[N]` float64 in (0, 1).

    Returns:
        `[N]` int64.
    """
    ends = frequencies.cumsum(0)
    own = frequencies[targets]
    # The point in what is left when the target's piece is taken out of the line of all frequencies.
    point = uniforms * (ends[-1] - own)
    point = torch.where(point >= ends[targets] - own, point + own, point)
    return torch.searchsorted(ends, point, right=True).clamp(max=len(frequencies) - 1)
