"""Memory and time of the loss at the LM head, compared with the loss that builds the logits of all positions."""

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

Loss = Callable[[nn.Linear, Tensor, Tensor], Tensor]
"""`(LM head, hidden states [TOKENS, hidden_size], targets [TOKENS]) -> loss`, summed over the targets."""


_LOSSES: dict[str, Loss] = {
    "plain": lambda linear, hidden, targets: F.cross_entropy(linear(hidden).float(), targets, reduction="sum"),
    "without logits": lambda linear, hidden, targets: head.LMHead(linear)(hidden, head.loss_sum(targets, 0.0)),
}


def measure(hidden_size: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measure forward and backward of both losses in this process, for `TOKENS` targets and `VOCABULARY` token ids.

    The memory includes the hidden states, the head's weight, and the gradients of both, which either loss needs.

    Args:
        hidden_size: Size of the model's hidden states.
        dtype: Type of the model's weights.

    Returns:
        The rows of `losses` in `bench.json`; the ratios are to the plain loss.
    """
    targets = torch.randint(VOCABULARY, (TOKENS,), device=process_group.device())
    rows: list[dict[str, Any]] = []
    for name, loss in _LOSSES.items():
        peak, seconds = _cost(loss, targets, hidden_size, dtype)
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


def _cost(loss: Loss, targets: Tensor, hidden_size: int, dtype: torch.dtype) -> tuple[int, float]:
    """Return the peak memory, in bytes, and the time, in seconds, of one forward and backward."""
    device = targets.device
    seconds = 0.0

    def forward_and_backward() -> None:
        nonlocal seconds
        linear = nn.Linear(hidden_size, VOCABULARY, bias=False, dtype=dtype, device=device)
        hidden = torch.randn(TOKENS, hidden_size, dtype=dtype, device=device, requires_grad=True)
        get_accelerator().synchronize()
        started = time.perf_counter()
        loss(linear, hidden, targets).backward()
        get_accelerator().synchronize()
        seconds = time.perf_counter() - started

    peak = PeakMemory().during(forward_and_backward)
    forward_and_backward()  # timed apart: counting memory takes time, and the first call warms up
    return peak, seconds
