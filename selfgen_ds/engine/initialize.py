"""Put the model under DeepSpeed: engine, optimizer, learning rate, and the ZeRO-3 trace."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.runtime import compiler
from transformers import PreTrainedModel, get_scheduler

from selfgen_ds.config import OptimConfig
from selfgen_ds.data.batches import collate
from selfgen_ds.engine import extensions
from selfgen_ds.engine.step import forward_losses

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def initialize(
    model: PreTrainedModel, ds_config: dict[str, Any], optim: OptimConfig, total_steps: int
) -> deepspeed.DeepSpeedEngine:
    """Return the DeepSpeed engine, with an AdamW that does not decay norms and biases (one-dimensional parameters).

    Collective: every rank must call this.

    Args:
        ds_config: The resolved DeepSpeed JSON (`selfgen_ds.engine.ds_config.resolve`).
        total_steps: Optimizer steps of the run, which the learning-rate schedule spans.
    """
    extensions.clear_stale_locks()
    import_muon()
    parameters = [p for p in model.parameters() if p.requires_grad]
    # A sharded parameter is empty on every rank; `ds_shape` is its full shape.
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    warmup_steps = round(optim.warmup_ratio * total_steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[group for group in groups if group["params"]],  # adapters have no vectors
        lr_scheduler=lambda optimizer: get_scheduler(
            _SCHEDULES[optim.schedule], optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
        ),
        config=ds_config,
    )
    # DeepSpeed's own events count samples as steps, after which W&B would drop the metrics of lower step numbers.
    engine.monitor.enabled = False
    return engine


def import_muon() -> None:
    """Import the optimizer Muon, as every engine does and no run uses, but do not compile it: that takes 5 s."""
    compile_functions, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_functions


def warm_up(engine: deepspeed.DeepSpeedEngine) -> None:
    """Run a forward and a backward with gradients of 0, so that ZeRO-3 records the order of a training step.

    ZeRO-3 prefetches parameters in the order of its first forward. If a no-grad pass came first, ZeRO-3 would discard
    the record in every step, which takes 2 to 4 times the gathers. Random generators are left as they were. Collective:
    every rank must call this.
    """
    # An empty micro-batch: one row of two padding tokens, the fewest that run every layer (the last token of a row is
    # not read). The loss over no target is 0 and has gradients of 0.
    empty = collate([])
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        loss, router_loss = forward_losses(engine, empty, 0.0, None)
        engine.backward((loss + router_loss) * 0)
