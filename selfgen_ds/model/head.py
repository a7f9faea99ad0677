"""The loss, draws, and predictions, computed at the LM head for a chunk of positions at a time.

Logits of all positions never exist at once. Each computation is a `Reduction` that runs inside the forward of the LM
head module: there, ZeRO-3 gathers the head's weight and releases it again. Outside this forward, the weight would
stay gathered or get wrong gradients.

Shapes: N selected positions, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

_CHUNK = 256  # positions whose logits exist at the same time
# A draw makes copies of its logits, and the sort of top-p makes more: smaller chunks take no more memory than the loss.
_DRAW_CHUNK, _SORTED_CHUNK = 32, 16


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """The logits of a model: `cap * tanh(scale * linear(hidden) / cap)`, or `scale * linear(hidden)` without a cap."""

    scale: float = 1.0
    cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The projection of hidden states to logits. The scale is already applied to hidden states and bias."""

    weight: Tensor
    """`[V, H]`."""
    bias: Tensor | None
    """`[V]`."""
    cap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Project `[N, H]` to `[N, V]`. With a cap, the logits are float32 or float64."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.cap is None:
            return logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return (logits / self.cap).tanh_() * self.cap


Reduction = Callable[[Tensor, Projection], "Tensor | tuple[Tensor, ...]"]
"""`(hidden, projection) -> result`, with `hidden` `[N, H]`."""


class LMHead(nn.Module):
    """The model's output layer with the same parameters, which can also apply a reduction to its input.

    Without a reduction, this is the plain linear layer: the model's own forward then applies scale and cap.
    """

    def __init__(self, linear: nn.Linear, logit_transform: LogitTransform | None = None) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.logit_transform = logit_transform or LogitTransform()

    def forward(self, hidden: Tensor, reduction: Reduction | None = None) -> Tensor | tuple[Tensor, ...]:
        """Return logits, or the result of a reduction over the hidden states.

        Args:
            hidden: `[..., H]`; `[N, H]` with a reduction.
            reduction: Runs here, because ZeRO-3 has gathered the weight here.
        """
        if reduction is None:
            return F.linear(hidden, self.weight, self.bias)
        bias: Tensor | None = self.bias
        scale = self.logit_transform.scale
        if scale != 1.0:
            hidden = hidden * scale
            bias = None if bias is None else bias * scale
        return reduction(hidden, Projection(weight=self.weight, bias=bias, cap=self.logit_transform.cap))


def loss_sum(targets: Tensor, label_smoothing: float, weights: Tensor | None = None, dft: bool = False) -> Reduction:
    """Return a reduction to the sum of the positions' cross entropies, float32 (float64 for a float64 head).

    With label smoothing e, the target distribution is (1 - e) * one-hot + e / V. Its cross entropy needs no more logits
    than the plain one: CE + e * (h . W[y] + b[y] - mean_v (h . W[v] + b[v])).

    Args:
        targets: `[N]` int64. N may be 0: the loss is then 0 and has gradients of 0.
        weights: `[N]`, the weight of each position in the sum; None means 1. With weights, the backward computes the
            logits a second time.
        dft: Whether each position is also weighted by the probability of its target, which counts as a constant
            (dynamic fine-tuning, arXiv 2508.05629). Label smoothing has to be 0.
    """

    def reduction(hidden: Tensor, project: Projection) -> Tensor:
        if project.cap is not None:
            return _capped_loss_sum(hidden, project, targets, label_smoothing, weights, dft)
        weight, bias = project.weight, project.bias
        full_precision = weight.dtype in (torch.float32, torch.float64)
        # A sum in bfloat16 would leave the loss three digits, so the positions' losses are summed here, in float32.
        summed = full_precision and weights is None and not dft
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=_CHUNK, chunking_method=None, acc_policy="auto" if full_precision else "accurate"
        )
        loss = F.linear_cross_entropy(
            hidden, weight, targets, linear_bias=bias, reduction="sum" if summed else "none", options=options
        )
        if not summed:
            loss = loss if full_precision else loss.float()
            loss = _weighted_sum(loss, _with_probabilities(weights, loss) if dft else weights)
        if label_smoothing:
            away = weight[targets] - weight.mean(dim=0)
            margin = _weighted_sum((hidden * away).to(loss.dtype), weights)
            if bias is not None:
                margin = margin + _weighted_sum((bias[targets] - bias.mean()).to(loss.dtype), weights)
            loss = loss + label_smoothing * margin
        return loss

    return reduction


def _with_probabilities(weights: Tensor | None, losses: Tensor) -> Tensor:
    """Return the weights times the targets' probabilities, of which the losses are the negative logarithms: `[N]`."""
    probabilities = (-losses.detach()).exp()
    return probabilities if weights is None else probabilities * weights.to(losses.dtype)


def _weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """Sum `[N]` or `[N, H]` values to a scalar, each position by its weight."""
    return values.sum() if weights is None else (weights.to(values.dtype) @ values).sum()


def _capped_loss_sum(
    hidden: Tensor, project: Projection, targets: Tensor, label_smoothing: float, weights: Tensor | None, dft: bool
) -> Tensor:
    """Sum the cross entropies of capped logits, chunk by chunk.

    A cap is no product of matrices, which the library's chunked loss needs. Each chunk is checkpointed instead: the
    backward computes its logits again.
    """

    def chunk_loss(chunk: Tensor, chunk_targets: Tensor, chunk_weights: Tensor | None) -> Tensor:
        reduction = "sum" if chunk_weights is None and not dft else "none"
        logits = project.logits(chunk)
        losses = F.cross_entropy(logits, chunk_targets, reduction=reduction, label_smoothing=label_smoothing)
        return _weighted_sum(losses, _with_probabilities(chunk_weights, losses) if dft else chunk_weights)

    chunks = hidden.split(_CHUNK)
    split_weights = [None] * len(chunks) if weights is None else weights.split(_CHUNK)
    losses = [
        checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(chunks, targets.split(_CHUNK), split_weights, strict=True)
    ]
    return torch.stack(losses).sum()


Sampler = Callable[[Tensor, Tensor], Tensor]
"""`(logits, uniforms) -> tokens`: `[N, V]` and `[N]` float64 in (0, 1) to `[N]` int64."""


def sampler(temperature: float, top_p: float, top_k: int) -> Sampler:
    """Return a function that draws tokens by the inverse of the cumulative distribution.

    A token depends only on its logits and its uniform.

    Args:
        temperature, top_p, top_k: As in `transformers`; 1.0, 1.0, and 0 leave the distribution as it is.
    """
    warpers: list[Callable[[None, Tensor], Tensor]] = []
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))

    def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
        # One name for each stage of the logits, so that a stage is freed as soon as the next one exists.
        logits = logits.float()
        for warper in warpers:
            logits = warper(None, logits)
        logits = torch.softmax(logits, dim=-1)
        logits = logits.cumsum(dim=-1, dtype=torch.float64)
        # A uniform is greater than 0, so the first entry at or above the uniform has a positive probability.
        tokens = torch.searchsorted(logits, uniforms[:, None] * logits[:, -1:]).squeeze(1)
        # With NaN logits, no entry is at or above the uniform. Any token will do: the step is dropped for its loss.
        return tokens.clamp(max=logits.shape[-1] - 1)

    return sample


def draw(uniforms: Tensor, temperature: float, top_p: float, top_k: int) -> Reduction:
    """Return a reduction that draws one token per position: `[N]` int64.

    Args:
        uniforms: `[N]` float64 in (0, 1), the noise of the draws.
        temperature, top_p, top_k: The distribution, as in `sampler`.
    """
    sample = sampler(temperature, top_p, top_k)
    chunk_size = _SORTED_CHUNK if top_p < 1.0 else _DRAW_CHUNK

    def reduction(hidden: Tensor, project: Projection) -> Tensor:
        tokens = [hidden.new_empty(0, dtype=torch.int64)]
        for chunk, chunk_uniforms in zip(hidden.split(chunk_size), uniforms.split(chunk_size), strict=True):
            tokens.append(sample(project.logits(chunk), chunk_uniforms))
        return torch.cat(tokens)

    return reduction


class Prediction(NamedTuple):
    """What the model says of N positions."""

    best: Tensor
    """The most probable tokens: `[N]` int64."""
    second: Tensor
    """The second most probable tokens: `[N]` int64."""
    log_probability: Tensor
    """The targets' log-probabilities in nats: `[N]` float32."""
    confidence: Tensor
    """The probabilities of the most probable tokens: `[N]` float32."""
    entropy: Tensor
    """The entropies of the distributions in nats: `[N]` float32."""


def predict(targets: Tensor) -> Reduction:
    """Return a reduction to the fields of a `Prediction`.

    Args:
        targets: `[N]` int64.
    """

    def of_chunk(logits: Tensor, chunk_targets: Tensor) -> Prediction:
        total = logits.logsumexp(dim=-1)
        (first_logit, _), (best, second) = (part.unbind(dim=-1) for part in logits.topk(2, dim=-1))
        expected = (logits - total[:, None]).exp_().mul_(logits).sum(dim=-1)
        target_logit = logits.gather(1, chunk_targets[:, None]).squeeze(1)
        return Prediction(best, second, target_logit - total, (first_logit - total).exp(), total - expected)

    def reduction(hidden: Tensor, project: Projection) -> tuple[Tensor, ...]:
        chunks = zip(hidden.split(_CHUNK), targets.split(_CHUNK), strict=True)
        parts = [of_chunk(project.logits(chunk).float(), chunk_targets) for chunk, chunk_targets in chunks]
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))  # ZeRO-3's hooks take plain tuples

    return reduction
