"""What is done with hidden states at the LM head: the loss, draws, and predictions, none of which builds logits
for more than a chunk of positions.

All of it runs inside the LM head module's own forward. There ZeRO-3 gathers the head's weight and releases
it again; used anywhere else the weight stays gathered or gets wrong gradients.

Shapes: N selected positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

_CHUNK = 256  # positions whose logits exist at the same time
_DRAW_CHUNK, _SORTED_CHUNK = 32, 16  # a draw holds copies of them, top-p's sort many: no more bytes than the loss


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a model makes of its output layer: `cap * tanh(scale * linear(hidden) / cap)`, or no cap."""

    scale: float = 1.0
    cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Hidden states to logits. The scale is in hidden states and bias already."""

    weight: Tensor
    """`[V, H]`."""
    bias: Tensor | None
    """`[V]`."""
    cap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, V]` of `[N, H]`; in float32 or more behind a cap."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.cap is None:
            return logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return (logits / self.cap).tanh_() * self.cap


Reduction = Callable[[Tensor, Projection], "Tensor | tuple[Tensor, ...]"]
"""`(hidden [N, H], projection) -> result`."""


class LMHead(nn.Module):
    """The model's output layer, sharing its parameters, that can also reduce what it would project.

    Without a reduction it is the plain linear layer: scale and cap are applied by the model's own forward.
    """

    def __init__(self, linear: nn.Linear, form: LogitTransform | None = None) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.form = form or LogitTransform()

    def forward(self, hidden: Tensor, reduction: Reduction | None = None) -> Tensor | tuple[Tensor, ...]:
        if reduction is None:
            return F.linear(hidden, self.weight, self.bias)
        bias: Tensor | None = self.bias
        if self.form.scale != 1.0:
            hidden = hidden * self.form.scale
            bias = None if bias is None else bias * self.form.scale
        return reduction(hidden, Projection(weight=self.weight, bias=bias, cap=self.form.cap))


def loss_sum(targets: Tensor, label_smoothing: float, weights: Tensor | None = None) -> Reduction:
    """Cross entropy summed over positions, float32 (float64 for a float64 head).

    With smoothing e the target is (1 - e) one-hot + e / V, whose cross entropy needs no logits beyond the
    plain one: CE + e (h . W[y] + b[y] - mean_v (h . W[v] + b[v])).

    Args:
        targets: `[N]` int64. N may be 0: the loss is then 0, with (zero) gradients.
        weights: `[N]`, of the positions in the sum; None means 1. With them the logits are computed a second time, in
            the backward.
    """

    def reduction(hidden: Tensor, project: Projection) -> Tensor:
        if project.cap is not None:
            return _capped_loss_sum(hidden, project, targets, label_smoothing, weights)
        weight, bias = project.weight, project.bias
        full_precision = weight.dtype in (torch.float32, torch.float64)
        # Summing in bfloat16 would leave the loss 3 digits, so there the rows are summed here, in float32.
        summed = full_precision and weights is None
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=_CHUNK,
            chunking_method=None,
            acc_policy="auto" if full_precision else "accurate",
        )
        loss = F.linear_cross_entropy(
            hidden,
            weight,
            targets,
            linear_bias=bias,
            reduction="sum" if summed else "none",
            options=options,
        )
        if not summed:
            loss = _weighted_sum(loss if full_precision else loss.float(), weights)
        if label_smoothing:
            away = weight[targets] - weight.mean(dim=0)
            margin = _weighted_sum((hidden * away).to(loss.dtype), weights)
            if bias is not None:
                margin = margin + _weighted_sum((bias[targets] - bias.mean()).to(loss.dtype), weights)
            loss = loss + label_smoothing * margin
        return loss

    return reduction


def _weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """Of `[N]` or `[N, H]`, to a scalar."""
    return values.sum() if weights is None else (weights.to(values.dtype) @ values).sum()


def _capped_loss_sum(
    hidden: Tensor, project: Projection, targets: Tensor, label_smoothing: float, weights: Tensor | None
) -> Tensor:
    """A cap makes logits more than a product of matrices: each chunk's are computed again in the backward."""

    def chunk_loss(rows: Tensor, wanted: Tensor, its_weights: Tensor | None) -> Tensor:
        reduction = "sum" if its_weights is None else "none"
        losses = F.cross_entropy(project.logits(rows), wanted, reduction=reduction, label_smoothing=label_smoothing)
        return _weighted_sum(losses, its_weights)

    chunks = hidden.split(_CHUNK)
    split_weights = [None] * len(chunks) if weights is None else weights.split(_CHUNK)
    losses = [
        checkpoint(chunk_loss, rows, wanted, its_weights, use_reentrant=False, preserve_rng_state=False)
        for rows, wanted, its_weights in zip(chunks, targets.split(_CHUNK), split_weights, strict=True)
    ]
    return torch.stack(losses).sum()


Sampler = Callable[[Tensor, Tensor], Tensor]
"""`(logits [N, V], uniforms [N]) -> tokens [N]`."""


def sampler(temperature: float, top_p: float, top_k: int) -> Sampler:
    """A token from logits through the inverse of the cumulative distribution, a deterministic function of the noise.

    Args:
        temperature, top_p, top_k: As in `transformers`; 1.0, 1.0 and 0 leave the distribution as it is.
    """
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))

    def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
        # one name for all that is made of the logits: each is let go as soon as the next is there
        logits = warpers(None, logits.float())
        logits = torch.softmax(logits, dim=-1)
        logits = logits.cumsum(dim=-1, dtype=torch.float64)
        # noise > 0, so the first entry that reaches it belongs to a token with probability > 0
        found = torch.searchsorted(logits, uniforms[:, None] * logits[:, -1:]).squeeze(1)
        # NaN finds nothing; any token will do, the step is dropped for its loss
        return found.clamp(max=logits.shape[-1] - 1)

    return sample


def draw(uniforms: Tensor, temperature: float, top_p: float, top_k: int) -> Reduction:
    """Sample a token a position: `[N]` int64.

    Args:
        uniforms: `[N]` float64 in (0, 1), the noise.
        temperature, top_p, top_k: Of `sampler`.
    """
    sample = sampler(temperature, top_p, top_k)
    chunk = _SORTED_CHUNK if top_p < 1.0 else _DRAW_CHUNK

    def reduction(hidden: Tensor, project: Projection) -> Tensor:
        tokens = [hidden.new_empty(0, dtype=torch.int64)]
        for rows, noise in zip(hidden.split(chunk), uniforms.split(chunk), strict=True):
            tokens.append(sample(project.logits(rows), noise))
        return torch.cat(tokens)

    return reduction


def predict(targets: Tensor) -> Reduction:
    """The most probable token and the target's log-probability: `[N]` int64 and `[N]` float32.

    Args:
        targets: `[N]` int64.
    """

    def reduction(hidden: Tensor, project: Projection) -> tuple[Tensor, Tensor]:
        best = [hidden.new_empty(0, dtype=torch.int64)]
        log_probabilities = [hidden.new_empty(0, dtype=torch.float32)]
        for rows, wanted in zip(hidden.split(_CHUNK), targets.split(_CHUNK), strict=True):
            logits = project.logits(rows).float()
            best.append(logits.argmax(dim=-1))
            log_probabilities.append(-F.cross_entropy(logits, wanted, reduction="none"))
        return torch.cat(best), torch.cat(log_probabilities)

    return reduction
