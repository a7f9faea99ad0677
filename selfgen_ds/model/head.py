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
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from selfgen_ds.model.cross_entropy import Projection, cross_entropies

_CHUNK = 256  # positions whose logits exist at the same time
# A draw makes copies of its logits, and the sort of top-p makes more: smaller chunks take no more memory than the loss.
_DRAW_CHUNK, _SORTED_CHUNK = 32, 16
_DRAW_CHUNK_ON_ACCELERATORS = 256  # there, each chunk reads the head's weight again, which takes longer than the draw


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """The logits of a model: `cap * tanh(scale * linear(hidden) / cap)`, or `scale * linear(hidden)` without a cap."""

    scale: float = 1.0
    cap: float | None = None


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

    With label smoothing e, the target distribution is (1 - e) * one-hot + e / V.

    Args:
        targets: `[N]` int64. N may be 0: the loss is then 0 and has gradients of 0.
        weights: `[N]`, the weight of each position in the sum; None means 1. In full precision without weights, the
            backward does not compute the logits a second time.
        dft: Whether each position is also weighted by the probability of its target, which counts as a constant
            (dynamic fine-tuning, arXiv 2508.05629). Label smoothing has to be 0.
    """

    def reduction(hidden: Tensor, project: Projection) -> Tensor:
        if _has_library_loss(project):
            return _library_loss_sum(hidden, project, targets, label_smoothing, weights, dft)
        losses = cross_entropies(hidden, project, targets, label_smoothing)
        return _weighted_sum(losses, _with_probabilities(weights, losses) if dft else weights)

    return reduction


def _has_library_loss(project: Projection) -> bool:
    """Return whether torch's chunked loss serves: from version 2.13 on, in full precision, for logits without a cap."""
    full_precision = project.weight.dtype in (torch.float32, torch.float64)
    return hasattr(F, "linear_cross_entropy") and full_precision and project.cap is None


def _library_loss_sum(
    hidden: Tensor, project: Projection, targets: Tensor, label_smoothing: float, weights: Tensor | None, dft: bool
) -> Tensor:
    """Sum the cross entropies by torch's loss, which is as exact as ours in full precision, and reads logits once."""
    weight, bias = project.weight, project.bias
    summed = weights is None and not dft
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_CHUNK, chunking_method=None)
    loss = F.linear_cross_entropy(
        hidden, weight, targets, linear_bias=bias, reduction="sum" if summed else "none", options=options
    )
    if not summed:
        loss = _weighted_sum(loss, _with_probabilities(weights, loss) if dft else weights)
    if label_smoothing:  # needs no more logits: CE + e * (h . W[y] + b[y] - mean_v (h . W[v] + b[v]))
        away = weight[targets] - weight.mean(dim=0)
        margin = _weighted_sum((hidden * away).to(loss.dtype), weights)
        if bias is not None:
            margin = margin + _weighted_sum((bias[targets] - bias.mean()).to(loss.dtype), weights)
        loss = loss + label_smoothing * margin
    return loss


def _with_probabilities(weights: Tensor | None, losses: Tensor) -> Tensor:
    """Return the weights times the targets' probabilities, of which the losses are the negative logarithms: `[N]`."""
    probabilities = (-losses.detach()).exp()
    return probabilities if weights is None else probabilities * weights.to(losses.dtype)


def _weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """Sum `[N]` or `[N, H]` values to a scalar, each position by its weight."""
    return values.sum() if weights is None else (weights.to(values.dtype) @ values).sum()


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

    def reduction(hidden: Tensor, project: Projection) -> Tensor:
        chunk_size = _draw_chunk(hidden.device, sorts=top_p < 1.0)
        tokens = [hidden.new_empty(0, dtype=torch.int64)]
        for chunk, chunk_uniforms in zip(hidden.split(chunk_size), uniforms.split(chunk_size), strict=True):
            tokens.append(sample(project.logits(chunk), chunk_uniforms))
        return torch.cat(tokens)

    return reduction


def _draw_chunk(device: torch.device, sorts: bool) -> int:
    """Return the number of positions whose draws are made at the same time."""
    if device.type == "cpu":
        return _SORTED_CHUNK if sorts else _DRAW_CHUNK
    return _DRAW_CHUNK_ON_ACCELERATORS // 2 if sorts else _DRAW_CHUNK_ON_ACCELERATORS


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
