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
from selfgen_ds.model.reductions import packed_settings, places_of
from selfgen_ds.model.transfer import to_device, to_host
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

    The host waits for the device once, for all results together, and where DeepSpeed decides whether to apply the step.

    Args:
        batches: This rank's micro-batches of the step.
        drawn_context_weight: Weight of a target that directly follows a drawn token. Other targets have weight 1.
        no_grad_tokens: Tokens that this rank has read without gradients for the step.
        dft: Whether each target is also weighted by its probability, which does not count in the divisor.

    Raises:
        RuntimeError: The loss is not finite at ZeRO stage 0, at which DeepSpeed would apply the step.
    """
    weights = [_target_weights(batch, drawn_context_weight) for batch in batches]
    divisors = _sum_over_ranks(to_device(_divisors(batches, weights), engine.device))
    divisors = torch.where(divisors == 0, 1.0, divisors)
    parts = len(batches) * dist.get_world_size()  # DeepSpeed divides by these steps, and averages over the ranks
    learning_rate, coefficient = engine.get_lr()[0], engine.module.router_loss_coefficient
    of_loss, of_router_loss = parts / divisors[0], coefficient * parts / divisors[1]
    losses, router_losses = list[Tensor](), list[Tensor]()
    for number, (batch, batch_weights) in enumerate(zip(batches, weights, strict=True), start=1):
        loss, router_loss = forward_losses(engine, batch, label_smoothing, batch_weights, dft)
        losses, router_losses = [*losses, loss.detach()], [*router_losses, router_loss.detach()]
        objective = loss * of_loss.to(loss.dtype) + router_loss * of_router_loss.to(loss.dtype)
        if number == len(batches):
            totals = _sum_over_ranks(_totals(batches, losses, router_losses, no_grad_tokens))
            # NaN or infinity on one rank becomes a NaN gradient on every rank, so that DeepSpeed drops the step.
            objective = objective * (totals[:2].sum() * 0 + 1)
        engine.backward(objective)
        if whole_gradient := engine.zero_optimization_stage() == 0 and number == len(batches):
            norm = _norm_of_whole_gradient(engine, totals)
        engine.step()
    norm = norm if whole_gradient else engine.get_global_grad_norm()
    norm = torch.as_tensor(math.nan if norm is None else norm, dtype=torch.float64, device=engine.device)
    results = to_host(torch.cat([totals[:2] / divisors, totals[2:], norm.reshape(1)])).tolist()
    (loss, router_loss), (drawn, differing, tokens, without_gradients) = results[:2], map(int, results[2:6])
    return StepResult(
        loss=loss,
        learning_rate=learning_rate,
        router_loss=router_loss if coefficient else None,
        grad_norm=results[6],
        drawn=drawn,
        differing=differing,
        tokens=tokens,
        no_grad_tokens=without_gradients,
        applied=engine.was_step_applied(),
        suspects=[] if math.isfinite(loss) else _suspects(batches, losses),
    )


def _norm_of_whole_gradient(engine: deepspeed.DeepSpeedEngine, totals: Tensor) -> Tensor:
    """Return the norm of the gradient at ZeRO stage 0: there DeepSpeed keeps none, and drops no step.

    Raises:
        RuntimeError: The loss is not finite.
    """
    if not torch.isfinite(totals[:2]).all():
        raise RuntimeError(
            "the loss is not finite, and ZeRO stage 0 cannot drop a step: lower optim.learning_rate, or set "
            "zero_optimization.stage to 1, 2, or 3"
        )
    return get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None)


def _divisors(batches: list[TokenBatch], weights: list[Tensor | None]) -> Tensor:
    """Return what loss and router loss are divided by, as far as this rank knows: `[2]` float64.

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
    device, targets = engine.device, batch.target_ids[batch.loss_mask]
    routed = to_device(batch.sample_ids >= 0, device) if engine.module.router_loss_coefficient else None
    weights = None if weights is None else to_device(weights, device)
    result = engine(
        to_device(batch.context_ids, device),
        positions=to_device(places_of(batch.loss_mask), device),
        reduction=head.loss_sum(to_device(targets, device), label_smoothing, weights, dft),
        packed=packed_settings(engine.module, batch.position_ids[:, :-1]) if batch.packed else None,
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
    of_rows = torch.cat([torch.stack(counts).sum(dim=0).double(), torch.tensor([no_grad_tokens], dtype=torch.float64)])
    sums = [torch.stack(values).double().sum() for values in (losses, router_losses)]
    return torch.cat([torch.stack(sums), to_device(of_rows, sums[0].device)])


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
