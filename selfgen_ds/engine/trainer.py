"""The model under DeepSpeed: set-up, the ZeRO-3 trace, and one optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from selfgen_ds.config import OptimConfig
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.engine import extensions, head, launch

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def initialize(
    model: PreTrainedModel, ds_config: dict[str, Any], optim: OptimConfig, total_steps: int
) -> deepspeed.DeepSpeedEngine:
    """The DeepSpeed engine, with AdamW that does not decay norms and biases (the one-dimensional parameters).

    Collective.
    """
    extensions.clear_stale_locks()
    parameters = [p for p in model.parameters() if p.requires_grad]
    # a partitioned parameter is empty; `ds_shape` is its real shape
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    warmup_steps = round(optim.warmup_ratio * total_steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[group for group in groups if group["params"]],  # adapters have no vectors
        lr_scheduler=lambda optimizer: get_scheduler(
            _SCHEDULES[optim.schedule],
            optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=total_steps,
        ),
        config=ds_config,
    )
    engine.monitor.enabled = False  # its own events take samples for steps: W&B would drop what the journal then writes
    return engine


def warm_up(engine: deepspeed.DeepSpeedEngine) -> None:
    """A throw-away forward and backward with zero gradients.

    ZeRO-3 prefetches by the order of modules in its first forward. Were that a no-grad pass, the record
    would be thrown away in every step, at 2 to 4 times the gathers. Random generators are left as they were.
    """
    nothing = collate([]).to(engine.device)
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        loss, router_loss = _losses(engine, nothing, 0.0, None)
        engine.backward((loss + router_loss) * 0)


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
        loss, router_loss = _losses(engine, batch, label_smoothing, its_weights)
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


def _losses(
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
    return sorted(sample_id for ids in launch.everyone(mine) for sample_id in ids)
