"""The context mixture: tokens that the model draws replace some tokens of the reference.

    c_t = y_t                      where M_t = 0
    c_t ~ p_theta( . | c_<t )      where M_t = 1,      M_t ~ Bernoulli(p) over replaceable tokens

(Cen et al., TMLR 2025, arXiv 2410.14655; Bengio et al. 2015, arXiv 1506.03099.) If the noise of every position is held
fixed, a draw is a deterministic function of its prefix. Each of k parallel passes ("parallel scheduled sampling",
Duckworth et al. 2019; k = 1: Mihaylova & Martins 2019) recomputes all masked tokens from the contexts of the pass
before. When a pass changes nothing, the contexts are those that token-by-token drawing gives: an exact draw
(fixed-point sampling: Wiggers & Hoogeboom 2020, arXiv 2002.09928; Song et al. 2021, arXiv 2002.03629).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfgen_ds import hashing
from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods.method import SAMPLING, Policy

Position = Literal["even", "early", "late", "span"]

MIXTURE = SAMPLING | {
    "replace_probability",
    "schedule",
    "schedule_share",
    "final_share",
    "final_probability",
    "clean_share",
    "runaway",
    "position",
    "span_tokens",
    "passes",
    "max_differing_share",
    "max_differing_tokens",
    "drawn_context_weight",
}
"""Settings that every method with a mixture reads."""


def replacement_mask(
    batch: TokenBatch,
    probability: float,
    keys: tuple[int, ...],
    position: Position = "even",
    span_tokens: int | None = None,
) -> Tensor:
    """Draw the mask M of one micro-batch: a function of the keys, the sample ids, and the positions alone.

    Args:
        probability: p. With `even`, every replaceable token is masked with this probability. With `early`, the first of
            an answer's n replaceable tokens is, and the probability falls linearly to p / n at the last; with `late`,
            it rises from p / n to p. With `span`, a sample has one run of `span_tokens` masked tokens with this
            probability; it starts at any of the sample's replaceable tokens, and ends with its answer at the latest.
        keys: Keys of the noise: its purpose (`selfgen_ds.hashing`), the seed, and the step or round.

    Returns:
        `[batch, length]` bool.
    """
    coin = hashing.uniform(*keys, batch.sample_ids, batch.position_ids)
    if position == "even":
        return (coin < probability) & batch.replaceable_mask
    if position == "span":
        return _span(batch, probability, keys, span_tokens or 1)
    from_start, from_end = _ordinals(batch.replaceable_mask), _ordinals(batch.replaceable_mask.flip(1)).flip(1)
    ordinal = from_end if position == "early" else from_start
    return (coin < probability * ordinal.double() / (from_start + from_end - 1)) & batch.replaceable_mask


def mask_of(config: SelfgenConfig, batch: TokenBatch, probability: float, keys: tuple[int, ...]) -> Tensor:
    """Draw the mask that the settings describe: `[batch, length]` bool.

    Args:
        keys: Keys of the noise: its purpose (`selfgen_ds.hashing`), the seed, and the step or round.
    """
    mask = replacement_mask(batch, probability, keys, config.position, config.span_tokens)
    return mask & ~clean_rows(batch, config.clean_share, keys)


def clean_rows(batch: TokenBatch, share: float, keys: tuple[int, ...]) -> Tensor:
    """Return the tokens of the samples whose context stays the reference: `[batch, length]` bool.

    Args:
        share: The probability of a sample to be one.
        keys: Keys of the noise, as those of the mask.
    """
    if not share:
        return torch.zeros_like(batch.replaceable_mask)
    return hashing.uniform(hashing.CLEAN, *keys, batch.sample_ids) < share


def _span(batch: TokenBatch, probability: float, keys: tuple[int, ...], tokens: int) -> Tensor:
    """Mask one run of tokens in some samples: `[batch, length]` bool."""
    purpose, *rest = keys
    chosen = hashing.uniform(hashing.SPAN, purpose, *rest, batch.sample_ids, 0) < probability
    place = hashing.uniform(hashing.SPAN, purpose, *rest, batch.sample_ids, 1)
    replaceable = batch.replaceable_mask
    number = _running_count(batch, replaceable) - 1  # of a replaceable token in its sample, from 0
    first = _first_columns(batch)
    count = torch.zeros_like(first).scatter_add(1, first, replaceable.long()).gather(1, first)
    start = (place * count).long()
    # A run ends with the answer that it starts in: its tokens have no gap between them and the start.
    ordinal = _ordinals(replaceable)
    behind = number - start
    return replaceable & chosen & (behind >= 0) & (behind < tokens) & (behind < ordinal)


def mix(
    batches: list[TokenBatch],
    policy: Policy,
    masks: list[Tensor],
    passes: int | Literal["exact"],
    keys: tuple[int, ...],
    max_differing_share: float = 1.0,
    max_differing_tokens: int | None = None,
) -> tuple[list[TokenBatch], int]:
    """Replace the masked tokens of the contexts by draws; targets and loss masks stay as they are.

    Collective: every rank must call this, because the policy's draws are collective. All ranks make the same number of
    passes.

    A pass recomputes the tokens that can still change: in each sample, the masked tokens after the first token that
    the last pass changed. All other tokens were drawn from the prefix that stands before them now. Every pass
    therefore settles at least one masked token of each sample, and `exact` needs at most as many passes as a sample
    has masked tokens. If the policy can draw in order, `exact` does so when the further passes that would be needed, at
    the pace of the last one, take longer.

    Args:
        batches: The micro-batches of one optimizer step.
        masks: For each micro-batch, `[batch, length]` bool from `replacement_mask`.
        passes: Parallel passes, 1 or more; with `exact`, passes are made until nothing changes on any rank.
        keys: Keys of the noise: its purpose (`selfgen_ds.hashing`), the seed, and the step or round.
        max_differing_share: Largest share of a sample's response tokens that may differ from the reference. The draws
            stop at the first differing token beyond this share.
        max_differing_tokens: Largest number of them; None for no other limit than the share.

    Returns:
        The micro-batches, and the passes that were made: fewer than asked for if nothing could change any more. Tokens
        that were drawn in order count as one pass.
    """
    limit = _Limit(share=max_differing_share, tokens=max_differing_tokens)
    batches = [replace(batch, replaced_mask=mask) for batch, mask in zip(batches, masks, strict=True)]
    pending, made, before = masks, 0, 0
    while made != passes and (left := policy.max_over_ranks(int(torch.stack([mask.sum() for mask in pending]).sum()))):
        uniforms = [
            hashing.uniform(*keys, batch.sample_ids[mask], batch.position_ids[mask])
            for batch, mask in zip(batches, pending, strict=True)
        ]
        in_order = passes == "exact" and policy.can_draw_in_order and not batches[0].packed
        in_order = in_order and made > 0 and left > policy.passes_in_order * (before - left)
        old, drawn = batches, (policy.draw_in_order if in_order else policy.draw)(batches, pending, uniforms)
        batches = [
            replace(batch, context_ids=batch.context_ids.masked_scatter(mask, tokens))
            for batch, mask, tokens in zip(batches, pending, drawn, strict=True)
        ]
        pending = [
            torch.zeros_like(mask) if in_order else _pending(mask, was, batch, limit)
            for mask, was, batch in zip(pending, old, batches, strict=True)
        ]
        made, before = made + 1, left
    return [restore_reference_from(batch, _differing_too_much(batch, limit)) for batch in batches], made


def restore_reference_from(batch: TokenBatch, marked: Tensor) -> TokenBatch:
    """Put the reference back from the first marked token of each sample to the end of the sample.

    The tokens before the first marked one stay: they are a draw of the process that stops there.

    Args:
        marked: `[batch, length]` bool.
    """
    stopped = _running_count(batch, marked) > 0
    context_ids = torch.where(stopped, batch.target_ids, batch.context_ids)
    return replace(batch, context_ids=context_ids, replaced_mask=batch.replaced_mask & ~stopped)


@dataclass(frozen=True, kw_only=True)
class _Limit:
    """The most differing tokens of a sample: a share of its response tokens, and a number."""

    share: float
    tokens: int | None


def _pending(pending: Tensor, before: TokenBatch, after: TokenBatch, limit: _Limit) -> Tensor:
    """Return the tokens that may still change after a pass: `[batch, length]` bool.

    Args:
        pending: The tokens that the pass drew.
        before, after: The batch before and after the pass.
    """
    changed = before.context_ids != after.context_ids
    pending = pending & (_running_count(after, changed) - changed.long() > 0)
    # If the draws stop at a settled token, the tokens after it are not needed.
    settled_stop = _differing_too_much(after, limit) & ~pending
    return pending & (_running_count(after, settled_stop) == 0)


def _differing_too_much(batch: TokenBatch, limit: _Limit) -> Tensor:
    """Mark the differing tokens beyond a sample's limit: `[batch, length]` bool."""
    differing = batch.context_ids != batch.target_ids
    first = _first_columns(batch)
    counts = torch.zeros_like(first).scatter_add(1, first, batch.loss_mask.long()).gather(1, first)
    allowed = (counts.double() * limit.share + 1e-9).floor()  # in floating point, 0.29 * 100 is less than 29
    allowed = allowed if limit.tokens is None else allowed.clamp(max=limit.tokens)
    return differing & (_running_count(batch, differing) > allowed)


def _running_count(batch: TokenBatch, marked: Tensor) -> Tensor:
    """Count the marked tokens of the same sample up to and including each token: `[batch, length]` int64."""
    counts = marked.long().cumsum(dim=1)
    return counts - F.pad(counts, (1, 0)).gather(1, _first_columns(batch))


def _first_columns(batch: TokenBatch) -> Tensor:
    """Return the column of the first token of each token's sample: `[batch, length]` int64."""
    return torch.arange(batch.context_ids.shape[1]) - batch.position_ids


def _ordinals(mask: Tensor) -> Tensor:
    """Number the marked tokens of each run of marked tokens, from 1: `[batch, length]` int64."""
    counts = mask.long().cumsum(dim=1)
    return counts - counts.masked_fill(mask, 0).cummax(dim=1).values
