"""The context mixture: which reference tokens give way to tokens that the model drew.

    c_t = y_t                      where M_t = 0
    c_t ~ p_theta( . | c_<t )      where M_t = 1,      M_t ~ Bernoulli(p) over replaceable tokens

(Cen et al., TMLR 2025, arXiv 2410.14655; Bengio et al. 2015.) With the noise of every position held fixed,
a draw is a deterministic function of its prefix, so k parallel passes ("parallel scheduled sampling",
Duckworth et al. 2019; k = 1: Mihaylova & Martins 2019) recompute all masked tokens from the last pass's
contexts. Where nothing changes any more, the context is what drawing token after token gives: an exact draw
(fixed-point sampling: Wiggers & Hoogeboom 2020, arXiv 2002.09928; Song et al. 2021, arXiv 2002.03629).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfgen_ds import hashing
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods.method import Policy

_FURTHER_PASSES = 8
"""What drawing in order is worth: 3 to 17 passes were measured, by size of the model and number of rows."""

Position = Literal["even", "early", "late"]

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


def replacement_mask(
    batch: TokenBatch, probability: float, keys: tuple[int, ...], position: Position = "even"
) -> Tensor:
    """M of one micro-batch: `[batch, length]` bool, a function of keys, sample id and position in it alone.

    Args:
        probability: p of every replaceable token; of the first (`early`) or last (`late`) one of an answer, from
            where it falls linearly to p / n over the answer's n replaceable tokens.
        keys: Of the noise: stream, seed, and step or round.
    """
    coin = hashing.uniform(*keys, batch.sample_ids, batch.position_ids)
    if position == "even":
        return (coin < probability) & batch.replaceable
    from_start, from_end = _places(batch.replaceable), _places(batch.replaceable.flip(1)).flip(1)
    place = from_end if position == "early" else from_start
    return (coin < probability * place.double() / (from_start + from_end - 1)) & batch.replaceable


def mix(
    window: list[TokenBatch],
    policy: Policy,
    masks: list[Tensor],
    passes: int | Literal["exact"],
    keys: tuple[int, ...],
    max_differing_share: float = 1.0,
) -> tuple[list[TokenBatch], int]:
    """Replace the masked tokens of a window's contexts by draws; targets and loss masks stay as they are. Collective.

    A pass recomputes what can still change: in each sample, the masked tokens behind the first one that the last
    pass changed. All others have read what stands before them now. So every pass settles a masked token of each
    sample at least, and `exact` needs as many passes as a sample has masked tokens at most. Where the policy can draw
    token after token, `exact` does so once more than 8 further passes like the last one would be needed.

    Args:
        window: The micro-batches of one optimizer step.
        masks: `[batch, length]` bool a micro-batch, from `replacement_mask`.
        passes: Parallel passes, 1 or more; `exact`: until nothing changes on any rank.
        keys: Of the noise: stream, seed, and step or round.
        max_differing_share: Of a sample's response tokens; at the first differing token beyond it the draws stop.

    Returns:
        The window, and the passes that were made: fewer than asked for where nothing could change any more. Tokens
        that were drawn in order count as one.
    """
    window = [replace(batch, drawn=mask) for batch, mask in zip(window, masks, strict=True)]
    pending, made, before = masks, 0, 0
    while made != passes and (left := policy.max_over_ranks(int(torch.stack([mask.sum() for mask in pending]).sum()))):
        uniforms = [
            hashing.uniform(*keys, batch.sample_ids[mask], batch.position_ids[mask])
            for batch, mask in zip(window, pending, strict=True)
        ]
        in_order = passes == "exact" and policy.can_draw_in_order and not window[0].packed
        in_order = in_order and made > 0 and left > _FURTHER_PASSES * (before - left)
        old, drawn = window, (policy.draw_in_order if in_order else policy.draw)(window, pending, uniforms)
        window = [
            replace(batch, context=batch.context.masked_scatter(mask, tokens))
            for batch, mask, tokens in zip(window, pending, drawn, strict=True)
        ]
        pending = [
            torch.zeros_like(mask) if in_order else _pending(mask, was, batch, max_differing_share)
            for mask, was, batch in zip(pending, old, window, strict=True)
        ]
        made, before = made + 1, left
    return [stop(batch, _differing_too_much(batch, max_differing_share)) for batch in window], made


def stop(batch: TokenBatch, marked: Tensor) -> TokenBatch:
    """Put the reference back from the first marked token of each sample on.

    The prefix before it stays what it was: a draw of the process that stops there.

    Args:
        marked: `[batch, length]` bool.
    """
    behind = _running_count(batch, marked) > 0
    context = torch.where(behind, batch.target, batch.context)
    return replace(batch, context=context, drawn=batch.drawn & ~behind)


def _pending(pending: Tensor, before: TokenBatch, after: TokenBatch, max_differing_share: float) -> Tensor:
    """`[batch, length]` bool: what may still change, of what was pending in the pass from `before` to `after`."""
    changed = before.context != after.context
    pending = pending & (_running_count(after, changed) - changed.long() > 0)
    # where the draws stop at a settled token, those behind it are not needed
    settled_stop = _differing_too_much(after, max_differing_share) & ~pending
    return pending & (_running_count(after, settled_stop) == 0)


def _differing_too_much(batch: TokenBatch, share: float) -> Tensor:
    """`[batch, length]` bool: differing tokens beyond this share of their sample's response tokens."""
    differing = batch.context != batch.target
    first = _first_columns(batch)
    counts = torch.zeros_like(first).scatter_add(1, first, batch.loss_mask.long()).gather(1, first)
    allowed = (counts.double() * share + 1e-9).floor()  # 0.29 * 100 is less than 29
    return differing & (_running_count(batch, differing) > allowed)


def _running_count(batch: TokenBatch, marked: Tensor) -> Tensor:
    """`[batch, length]` int64: marked tokens of the same sample, up to and with each token."""
    counts = marked.long().cumsum(dim=1)
    return counts - F.pad(counts, (1, 0)).gather(1, _first_columns(batch))


def _first_columns(batch: TokenBatch) -> Tensor:
    """`[batch, length]` int64: the column of the first token of each token's sample."""
    return torch.arange(batch.context.shape[1], device=batch.context.device) - batch.position_ids


def _places(mask: Tensor) -> Tensor:
    """`[batch, length]` int64: the place, from 1, of each marked token in its run of marked tokens."""
    counts = mask.long().cumsum(dim=1)
    return counts - counts.masked_fill(mask, 0).cummax(dim=1).values
