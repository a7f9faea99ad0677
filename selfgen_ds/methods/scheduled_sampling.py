"""`scheduled_sampling`: in every step, tokens that the model draws replace some reference tokens of the context.

This is Bengio et al. 2015 (arXiv 1506.03099), drawn in parallel passes: `passes: 1` is two-pass scheduled sampling
(Mihaylova & Martins 2019), k passes are parallel scheduled sampling (Duckworth et al. 2019), and `exact` is the
sequential process itself.
"""

from __future__ import annotations

from typing import ClassVar

from selfgen_ds import hashing
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods import schedule
from selfgen_ds.methods.method import Method, Policy
from selfgen_ds.methods.mixture import MIXTURE, mask_of, mix


class ScheduledSampling(Method):
    """Mixes the contexts of every step; the target stays the reference: `loss = - sum_t log p(y_t | c_<t)`."""

    settings: ClassVar[frozenset[str]] = MIXTURE

    def replace_probability(self, step: int) -> float:
        return self.scale * schedule.replace_probability(self.config, step, self.plan.total_steps)

    def contexts(self, batches: list[TokenBatch], policy: Policy, step: int) -> list[TokenBatch]:
        c, seed, p = self.config, self.plan.seed, self.replace_probability(step)
        masks = [mask_of(c, batch, p, (hashing.REPLACE, seed, step)) for batch in batches]
        keys = (hashing.DRAW, seed, step)
        limits = c.max_differing_share, c.max_differing_tokens
        passes = c.passes or ("exact" if c.position == "span" else 1)  # a span is written as at inference
        batches, self.passes = mix(batches, policy, masks, passes, keys, *limits)
        return batches
