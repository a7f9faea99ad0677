"""The model under DeepSpeed: its engine, optimizer and learning rate, and the ZeRO-3 trace."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from transformers import PreTrainedModel, get_scheduler

from selfgen_ds.config import OptimConfig
from selfgen_ds.data.batches import collate
from selfgen_ds.engine import extensions
from selfgen_ds.engine.step import forward_losses

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
    engine.monitor.enabled = False  # its own events take samples for steps: W&B would drop the metrics that follow
    return engine


def warm_up(engine: deepspeed.DeepSpeedEngine) -> None:
    """A throw-away forward and backward with zero gradients.

    ZeRO-3 prefetches by the order of modules in its first forward. Were that a no-grad pass, the record
    would be thrown away in every step, at 2 to 4 times the gathers. Random generators are left as they were.
    """
    nothing = collate([]).to(engine.device)
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        loss, router_loss = forward_losses(engine, nothing, 0.0, None)
        engine.backward((loss + router_loss) * 0)
