"""Run one optimizer step: forward and backward of every micro-batch, then the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import get_total_norm

from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.model import head
from selfgen_ds.ranks import process_group


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of one optimizer step over all ranks, the same on every rank."""

    loss: float
    """Weighted mean of the losses of the step's target tokens."""
    learning_rate: float
    """Learning rate of the step."""
    router_loss: float | None
    """Load balancing loss of a mixture of experts without its coefficient: the mean over micro-batches with tokens."""
    grad_norm: float
    """Norm of the gradient before clipping; NaN if the DeepSpeed JSON turns its computation off."""
    drawn: int
    """Drawn context tokens at the positions of targets."""
    differing: int
    """Drawn context tokens that differ from the target at their position."""
    tokens: int
    """Tokens of the rows, without padding."""
    no_grad_tokens: int
    """Tokens that forwards without gradients have read for the step: in passes, and in rounds drawn before it."""
    applied: bool
    """False if the loss or a gradient was not finite, so that the step was dropped."""
    suspects: list[int]
    """Sample ids of the micro-batches whose loss was not finite."""


def train_step(
    engine: deepspeed.DeepSpeedEngine,
    batches: list[TokenBatch],
    label_smoothing: float,
    drawn_context_weight: float = 1.0,
    no_grad_tokens: int = 0,
    dft: bool = False,
) -> StepResult:
    """Run forward and backward of every micro-batch, then the optimizer.

    The loss is the weighted sum over the target tokens of the whole step, divided by the sum of their weights, over all
    micro-batches and ranks. It is never a mean of unequal means. A mixture of experts is also trained on its router
    loss. Collective: every rank must call this with the same number of micro-batches.

    Args:
        batches: This rank's micro-batches of the step.
        drawn_context_weight: Weight of a target that directly follows a drawn token. Other targets have weight 1.
        no_grad_tokens: Tokens that this rank has read without gradients for the step.
        dft: Whether each target is also weighted by its probability, which does not count in the divisor.

    Raises:
        RuntimeError: The loss is not finite at ZeRO stage 0, at which DeepSpeed would apply the step.
    """
    weights = [_target_weights(batch, drawn_context_weight) for batch in batches]
    total_weight, nonempty = (count or 1.0 for count in _sum_over_ranks(_normalizers(batches, weights)).tolist())
    parts = len(batches) * dist.get_world_size()  # DeepSpeed divides by these steps, and averages over the ranks
    learning_rate, coefficient = engine.get_lr()[0], engine.module.router_loss_coefficient
    losses, router_losses = list[Tensor](), list[Tensor]()
    for number, (batch, batch_weights) in enumerate(zip(batches, weights, strict=True), start=1):
        loss, router_loss = forward_losses(engine, batch, label_smoothing, batch_weights, dft)
        losses, router_losses = [*losses, loss.detach()], [*router_losses, router_loss.detach()]
        objective = loss * (parts / total_weight) + router_loss * (coefficient * parts / nonempty)
        if number == len(batches):
            totals = _sum_over_ranks(_totals(batches, losses, router_losses, no_grad_tokens))
            # NaN or infinity on one rank becomes a NaN gradient on every rank, so that DeepSpeed drops the step.
            objective = objective * (totals[:2].sum() * 0 + 1)
        engine.backward(objective)
        if engine.zero_optimization_stage() == 0 and number == len(batches):
            if not torch.isfinite(totals[:2]).all():
                raise RuntimeError(
                    "the loss is not finite, and ZeRO stage 0 cannot drop a step: lower optim.learning_rate, or set "
                    "zero_optimization.stage to 1, 2, or 3"
                )
            unpartitioned_norm = get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None)
        engine.step()
    # DeepSpeed keeps no norm at stage 0, where every rank has the whole gradient.
    grad_norm = engine.get_global_grad_norm() if engine.zero_optimization_stage() else unpartitioned_norm
    loss_total, router_total, drawn, differing, tokens, without_gradients = totals.tolist()
    return StepResult(
        loss=loss_total / total_weight,
        learning_rate=learning_rate,
        router_loss=router_total / nonempty if coefficient else None,
        grad_norm=math.nan if grad_norm is None else float(grad_norm),
        drawn=int(drawn),
        differing=int(differing),
        tokens=int(tokens),
        no_grad_tokens=int(without_gradients),
        applied=engine.was_step_applied(),
        suspects=[] if math.isfinite(loss_total) else _suspects(batches, losses),
    )


def _normalizers(batches: list[TokenBatch], weights: list[Tensor | None]) -> Tensor:
    """Return the divisors of loss and router loss on this rank: `[2]` float64.

    They are the sum of the targets' weights, and the number of micro-batches with tokens.
    """
    counts = [
        torch.stack([b.loss_mask.sum() if w is None else w.sum(), (b.sample_ids >= 0).any()]).double()
        for b, w in zip(batches, weights, strict=True)
    ]
    return torch.stack(counts).sum(dim=0)


def _target_weights(batch: TokenBatch, drawn_context_weight: float) -> Tensor | None:
    """Return the targets' weights in row-major order, `[targets]` float32; None if all of them are 1."""
    if drawn_context_weight == 1.0:
        return None
    # A sample's first token is never a target, so a target follows a token of its own sample.
    follows_drawn = F.pad(batch.replaced_mask[:, :-1], (1, 0))
    return torch.where(follows_drawn[batch.loss_mask], drawn_context_weight, 1.0)


def forward_losses(
    engine: deepspeed.DeepSpeedEngine,
    batch: TokenBatch,
    label_smoothing: float,
    weights: Tensor | None,
    dft: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one forward; return the weighted sum of the token losses, and the router loss (0 for a dense model).

    Collective under ZeRO-3: every rank must call this, because the forward gathers weights.

    Args:
        weights: `[targets]`, the weight of each target in row-major order; None means 1.
    """
    reduction = head.loss_sum(batch.target_ids[batch.loss_mask], label_smoothing, weights, dft)
    routed = batch.sample_ids >= 0 if engine.module.router_loss_coefficient else None
    result = engine(
        batch.context_ids,
        positions=batch.loss_mask,
        reduction=reduction,
        position_ids=batch.packed_position_ids,
        routed=routed,
    )
    return (result, result.new_zeros(())) if routed is None else result


def _totals(
    batches: list[TokenBatch], losses: list[Tensor], router_losses: list[Tensor], no_grad_tokens: int
) -> Tensor:
    """Sum up the step on this rank: `[6]` float64.

    The sums are: loss, router loss, drawn tokens, drawn tokens that differ from the target, real tokens, and tokens
    read without gradients.
    """
    drawn = [b.replaced_mask & b.loss_mask for b in batches]  # other drawn tokens have no target to differ from
    counts = [
        torch.stack([d.sum(), (d & (b.context_ids != b.target_ids)).sum(), (b.sample_ids >= 0).sum()])
        for b, d in zip(batches, drawn, strict=True)
    ]
    sums = [torch.stack(values).double().sum() for values in (losses, router_losses)]
    read = torch.tensor([no_grad_tokens], dtype=torch.float64, device=sums[0].device)
    return torch.cat([torch.stack(sums), torch.stack(counts).sum(dim=0).double(), read])


def _sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place. Collective: every rank must call this."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def _suspects(batches: list[TokenBatch], losses: list[Tensor]) -> list[int]:
    """Return the sample ids of all ranks' micro-batches whose loss is not finite, ascending.

    Collective: every rank must call this. All ranks do, because they decide by the same sum of losses.
    """
    sample_ids = [
        sample_id
        for batch, loss in zip(batches, losses, strict=True)
        if not torch.isfinite(loss)
        for sample_id in batch.sample_ids[batch.sample_ids >= 0].unique().tolist()
    ]
    return sorted(sample_id for ids in process_group.all_gather_object(sample_ids) for sample_id in ids)
