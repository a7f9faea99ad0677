"""`scheduled_sampling`: in every step the model's own tokens replace some reference tokens of the context.

Bengio et al. 2015, drawn in parallel passes: with `passes: 1` two-pass scheduled sampling (Mihaylova & Martins
2019), with k passes parallel scheduled sampling (Duckworth et al. 2019).
"""

from __future__ import annotations

from typing import ClassVar

from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods import schedule
from selfgen_ds.methods.mixture import Policy, mix, replacement_mask


class ScheduledSampling:
    """The target stays the reference: `loss = - sum_t log p(y_t | c_<t)`."""

    settings: ClassVar[frozenset[str]] = frozenset(
        {"replace_probability", "schedule", "schedule_share", "passes", "temperature", "top_p", "top_k"}
    )

    def __init__(self, config: SelfgenConfig, seed: int, total_steps: int) -> None:
        self.config = config
        self.seed = seed
        self.total_steps = total_steps
        self.passes = config.passes

    def replace_probability(self, step: int) -> float:
        c = self.config
        return schedule.replace_probability(c.schedule, c.replace_probability, c.schedule_share, step, self.total_steps)

    def contexts(self, window: list[TokenBatch], policy: Policy, step: int) -> list[TokenBatch]:
        probability = self.replace_probability(step)
        masks = [replacement_mask(batch, probability, self.seed, step) for batch in window]
        return mix(window, policy, masks, self.passes, self.seed, step)
