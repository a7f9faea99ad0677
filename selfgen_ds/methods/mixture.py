"""The context mixture: which reference tokens give way to tokens that the model drew.

    c_t = y_t                      where M_t = 0
    c_t ~ p_theta( . | c_<t )      where M_t = 1,      M_t ~ Bernoulli(p) over replaceable tokens

(Cen et al., TMLR 2025, arXiv 2410.14655; Bengio et al. 2015.) With the noise of every position held fixed,
a draw is a deterministic function of its prefix, so k parallel passes ("parallel scheduled sampling",
Duckworth et al. 2019; k = 1: Mihaylova & Martins 2019) recompute all masked tokens from the last pass's
contexts.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods import noise
from selfgen_ds.methods.method import Policy

MIXTURE = frozenset(
    {
        "replace_probability",
        "schedule",
        "schedule_share",
        "position",
        "passes",
        "temperature",
        "top_p",
        "top_k",
        "max_differing_share",
        "drawn_context_weight",
    }
)
"""Settings of every method that mixes."""


def replacement_mask(batch: TokenBatch, probability: float, seed: int, step: int) -> Tensor:
    """M of one micro-batch: `[batch, length]` bool, a function of (seed, step, sample id, position in it) alone."""
    coin = noise.uniform(noise.REPLACE, seed, step, batch.sample_ids, batch.position_ids)
    return (coin < probability) & batch.replaceable


def mix(
    window: list[TokenBatch], policy: Policy, masks: list[Tensor], passes: int, seed: int, step: int
) -> list[TokenBatch]:
    """Replace the masked tokens of a window's contexts by draws; targets and loss masks stay as they are.

    Args:
        window: The micro-batches of one optimizer step.
        masks: `[batch, length]` bool a micro-batch, from `replacement_mask`.
        passes: Parallel passes, 1 or more.
    """
    uniforms = [
        noise.uniform(noise.DRAW, seed, step, batch.sample_ids[mask], batch.position_ids[mask])
        for batch, mask in zip(window, masks, strict=True)
    ]
    for _ in range(passes):
        drawn = policy.draw(window, masks, uniforms)
        window = [
            replace(batch, context=batch.context.masked_scatter(mask, tokens), drawn=mask)
            for batch, mask, tokens in zip(window, masks, drawn, strict=True)
        ]
    return window
