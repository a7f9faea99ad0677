"""The loss at the LM head beside the plain one, which builds the logits of all positions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from selfgen_ds.model import head
from selfgen_ds.ranks import process_group
from selfgen_ds.scaling.memory import PeakMemory

TOKENS, VOCABULARY = 4096, 131_072


def measure(hidden_size: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Forward and backward of the loss of `TOKENS` targets over `VOCABULARY` words, on this process alone.

    Memory counts hidden states, the head's weight and the gradients of both, which either way needs.

    Args:
        hidden_size: Of the model.
        dtype: Of its weights.
    """
    targets = torch.randint(VOCABULARY, (TOKENS,), device=process_group.device())

    def plain(linear: nn.Linear, hidden: Tensor) -> Tensor:
        return F.cross_entropy(linear(hidden).float(), targets, reduction="sum")

    def chunked(linear: nn.Linear, hidden: Tensor) -> Tensor:
        return head.LMHead(linear)(hidden, head.loss_sum(targets, 0.0))

    losses: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {"plain": plain, "without logits": chunked}
    rows: list[dict[str, Any]] = []
    for name, loss in losses.items():
        memory, seconds = PeakMemory(), 0.0

        def action(loss: Callable[[nn.Linear, Tensor], Tensor] = loss) -> None:
            nonlocal seconds
            linear = nn.Linear(hidden_size, VOCABULARY, bias=False, dtype=dtype, device=process_group.device())
            hidden = torch.randn(TOKENS, hidden_size, dtype=dtype, device=process_group.device(), requires_grad=True)
            get_accelerator().synchronize()
            started = time.perf_counter()
            loss(linear, hidden).backward()
            get_accelerator().synchronize()
            seconds = time.perf_counter() - started

        peak = memory.during(action)  # which also warms up
        action()
        rows.append(
            {
                "loss": name,
                "tokens": TOKENS,
                "vocabulary": VOCABULARY,
                "hidden_size": hidden_size,
                "dtype": str(dtype).removeprefix("torch."),
                "peak_memory_bytes": peak,
                "time_s": seconds,
            }
        )
    for row in rows:
        row["peak_memory_ratio"] = row["peak_memory_bytes"] / rows[0]["peak_memory_bytes"]
        row["time_ratio"] = row["time_s"] / rows[0]["time_s"]
    return rows
