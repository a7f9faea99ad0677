"""Cross entropies at the LM head, computed for a block of the vocabulary at a time and accumulated in float32.

Logits of the whole vocabulary never exist at once: the backward computes each block a second time. A block of the
weight's gradient is one product of matrices over all positions, so that it is rounded once, as the gradient of whole
logits is. A sum over chunks of positions, as in `torch.nn.functional.linear_cross_entropy`, is rounded to bfloat16 with
every chunk (docs/cost-details.md has the errors).

Shapes: N positions, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_ELEMENTS = {"cpu": 1 << 24}
"""Kind of device -> logits that exist at the same time; of other devices `_ELEMENTS_OF_OTHERS`."""
_ELEMENTS_OF_OTHERS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The projection of hidden states to logits: `cap * tanh(linear(hidden) / cap)`, or `linear(hidden)`.

    A model's scale is already applied to hidden states and bias.
    """

    weight: Tensor
    """`[V, H]`."""
    bias: Tensor | None
    """`[V]`."""
    cap: float | None

    def logits(self, hidden: Tensor, tokens: slice = slice(None)) -> Tensor:
        """Project `[N, H]` to the logits of some tokens, `[N, tokens]`. With a cap, they are float32 or float64."""
        logits = F.linear(hidden, self.weight[tokens], None if self.bias is None else self.bias[tokens])
        if self.cap is None:
            return logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return (logits / self.cap).tanh_() * self.cap


def cross_entropies(hidden: Tensor, project: Projection, targets: Tensor, label_smoothing: float) -> Tensor:
    """Return the cross entropy of each position in nats: `[N]` float32, or float64 for a float64 head.

    With label smoothing e, the target distribution is (1 - e) * one-hot + e / V.

    Args:
        hidden: `[N, H]`.
        targets: `[N]` int64.
    """
    return _CrossEntropies.apply(hidden, project.weight, project.bias, project.cap, targets, label_smoothing)


class _Block(NamedTuple):
    """A block of the vocabulary."""

    tokens: slice
    logits: Tensor
    """`[N, block]` float32 or float64."""
    is_target: Tensor
    """`[N]` bool: whether the target is in the block."""
    column: Tensor
    """`[N, 1]` int64: the target's column, or any other one."""


def _blocks(hidden: Tensor, project: Projection, targets: Tensor) -> Iterator[_Block]:
    size = len(project.weight)
    elements = _ELEMENTS.get(hidden.device.type, _ELEMENTS_OF_OTHERS)
    width = max(1, min(size, elements // max(1, len(hidden))))
    for first in range(0, size, width):
        tokens = slice(first, min(size, first + width))
        logits = project.logits(hidden, tokens)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        column = targets - first
        inside = (column >= 0) & (column < logits.shape[1])
        yield _Block(tokens, logits, inside, column.clamp(0, logits.shape[1] - 1)[:, None])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two matrices without rounding the sums: float32 for two of bfloat16."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cap: float | None,
        targets: Tensor,
        label_smoothing: float,
    ) -> Tensor:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        highest = hidden.new_full((len(hidden),), -torch.inf, dtype=dtype)
        total, of_target, mean = torch.zeros_like(highest), torch.zeros_like(highest), torch.zeros_like(highest)
        for block in _blocks(hidden, Projection(weight=weight, bias=bias, cap=cap), targets):
            before, highest = highest, torch.maximum(highest, block.logits.amax(dim=1))
            of_target = torch.where(block.is_target, block.logits.gather(1, block.column).squeeze(1), of_target)
            if label_smoothing:
                mean = mean + block.logits.sum(dim=1) / len(weight)
            in_block = (block.logits - highest[:, None]).exp_().sum(dim=1)
            total = total * (before - highest).exp() + in_block
        normalizer = highest + total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        ctx.cap, ctx.label_smoothing = cap, label_smoothing
        return normalizer - (1 - label_smoothing) * of_target - label_smoothing * mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        of_hidden = torch.zeros_like(hidden, dtype=normalizer.dtype) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        project = Projection(weight=weight, bias=bias, cap=ctx.cap)
        for tokens, logits, is_target, column in _blocks(hidden, project, targets):
            slope = None if ctx.cap is None else 1 - (logits / ctx.cap).square()
            of_logits = logits.sub_(normalizer[:, None]).exp_()
            if ctx.label_smoothing:
                of_logits -= ctx.label_smoothing / len(weight)
            of_logits.scatter_add_(1, column, (ctx.label_smoothing - 1) * is_target[:, None].to(of_logits.dtype))
            of_logits *= of_losses[:, None]
            if slope is not None:
                of_logits *= slope
            if of_bias is not None:
                of_bias[tokens] = of_logits.sum(dim=0)
            rounded = of_logits.to(weight.dtype)
            if of_weight is not None:
                of_weight[tokens] = rounded.T @ hidden
            if of_hidden is not None:
                of_hidden += _product(rounded, weight[tokens])
        of_hidden = None if of_hidden is None else of_hidden.to(hidden.dtype)
        return of_hidden, of_weight, of_bias, None, None, None
