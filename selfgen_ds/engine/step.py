"""One optimizer step: forward and backward of every micro-batch, then the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.model import head
from selfgen_ds.ranks import process_group


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did, over all ranks."""

    loss: float
    """Mean over the step's target tokens, by weight."""
    learning_rate: float
    """Of the matrices' parameter group, in this step."""
    router_loss: float | None
    """A mixture of experts' load balancing loss, without its coefficient: mean over micro-batches that have tokens."""
    grad_norm: float
    """Before clipping."""
    drawn: int
    """Drawn tokens in the place of a target."""
    differing: int
    """Those that differ from it."""
    tokens: int
    """Real tokens of the rows."""
    applied: bool
    """False if loss or gradient was not finite and the step was dropped."""
    suspects: list[int]
    """Sample ids of the micro-batches whose loss was not finite."""


def train_step(
    engine: deepspeed.DeepSpeedEngine,
    window: list[TokenBatch],
    label_smoothing: float,
    drawn_context_weight: float = 1.0,
) -> StepResult:
    """Forward and backward of every micro-batch, then the optimizer.

    The loss is the weighted sum over target tokens divided by the sum of the weights of the whole step, over all
    micro-batches and ranks: never a mean of unequal means. A mixture of experts is trained on its router loss as well.

    Args:
        drawn_context_weight: Weight of a target that directly follows a drawn token; others have 1.

    Raises:
        RuntimeError: The loss is not finite at ZeRO stage 0, where DeepSpeed would apply it.
    """
    weights = [_weights(batch, drawn_context_weight) for batch in window]
    counts = [
        torch.stack([b.loss_mask.sum() if w is None else w.sum(), (b.sample_ids >= 0).any()]).double()
        for b, w in zip(window, weights, strict=True)
    ]
    targets, batches = (count or 1.0 for count in _sum_over_ranks(torch.stack(counts).sum(dim=0)).tolist())
    # DeepSpeed divides by the accumulation steps and averages over ranks
    parts = len(window) * dist.get_world_size()
    learning_rate = engine.get_lr()[0]
    coefficient = engine.module.router_loss_coefficient
    losses: list[Tensor] = []
    router_losses: list[Tensor] = []
    for number, (batch, its_weights) in enumerate(zip(window, weights, strict=True), start=1):
        loss, router_loss = forward_losses(engine, batch, label_smoothing, its_weights)
        losses.append(loss.detach())
        router_losses.append(router_loss.detach())
        objective = loss * (parts / targets) + router_loss * (coefficient * parts / batches)
        if number == len(window):
            totals = _sum_over_ranks(_totals(window, losses, router_losses))
            # One rank's NaN or infinity becomes every rank's NaN gradient, on which DeepSpeed drops the step.
            objective = objective * (totals[:2].sum() * 0 + 1)
        engine.backward(objective)
        if engine.zero_optimization_stage() == 0 and number == len(window) and not torch.isfinite(totals[:2]).all():
            raise RuntimeError("the loss is not finite, and ZeRO stage 0 cannot drop a step")
        engine.step()
    loss_total, router_total, drawn, differing, tokens = totals.tolist()
    finite = math.isfinite(loss_total)
    return StepResult(
        loss=loss_total / targets,
        learning_rate=learning_rate,
        router_loss=router_total / batches if coefficient else None,
        grad_norm=float(engine.get_global_grad_norm() or 0.0),
        drawn=int(drawn),
        differing=int(differing),
        tokens=int(tokens),
        applied=engine.was_step_applied(),
        suspects=[] if finite else _suspects(window, losses),
    )


def _weights(batch: TokenBatch, drawn_context_weight: float) -> Tensor | None:
    """`[targets]` float32, in row-major order; none where all are 1."""
    if drawn_context_weight == 1.0:
        return None
    follows_drawn = F.pad(batch.drawn[:, :-1], (1, 0))  # in its own sample: a sample's first token is no target
    return torch.where(follows_drawn[batch.loss_mask], drawn_context_weight, 1.0)


def forward_losses(
    engine: deepspeed.DeepSpeedEngine, batch: TokenBatch, label_smoothing: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the token losses, and the router loss (0 for a model without one)."""
    reduction = head.loss_sum(batch.target[batch.loss_mask], label_smoothing, weights)
    routed = batch.sample_ids >= 0 if engine.module.router_loss_coefficient else None
    result = engine(
        batch.context,
        positions=batch.loss_mask,
        reduction=reduction,
        position_ids=batch.packed_position_ids,
        routed=routed,
    )
    return (result, result.new_zeros(())) if routed is None else result


def _totals(window: list[TokenBatch], losses: list[Tensor], router_losses: list[Tensor]) -> Tensor:
    """`[5]` float64 on this rank: loss, router loss, drawn tokens, drawn tokens that differ, real tokens."""
    drawn = [b.drawn & b.loss_mask for b in window]  # what stands beside the targets has nothing to differ from
    counts = [
        torch.stack([d.sum(), (d & (b.context != b.target)).sum(), (b.sample_ids >= 0).sum()])
        for b, d in zip(window, drawn, strict=True)
    ]
    sums = [torch.stack(values).double().sum() for values in (losses, router_losses)]
    return torch.cat([torch.stack(sums), torch.stack(counts).sum(dim=0).double()])


def _sum_over_ranks(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values


def _suspects(window: list[TokenBatch], losses: list[Tensor]) -> list[int]:
    """Every rank comes here together: all saw the same sum."""
    mine = [
        sample_id
        for batch, loss in zip(window, losses, strict=True)
        if not torch.isfinite(loss)
        for sample_id in batch.sample_ids[batch.sample_ids >= 0].unique().tolist()
    ]
    return sorted(sample_id for ids in process_group.all_gather_object(mine) for sample_id in ids)
