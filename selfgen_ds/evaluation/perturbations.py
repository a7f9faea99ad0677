"""Changes of a model's weights as deployment makes them: noise, and rounding to integers of a few bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_GROUP = 128  # weights that share a scale when they are rounded to 4 bits


@contextmanager
def perturbed(model: PreTrainedModel, kind: str, seed: int) -> Iterator[None]:
    """Change the weights of a model inside the context, and put them back after it.

    Weights are matrices, but for the embeddings and the LM head, which deployments keep as they are.

    Args:
        kind: `noise_S` adds normal noise of S times each weight's standard deviation. `int8` rounds every row of a
            matrix to 255 levels of the row's largest magnitude (vector-wise absmax quantization, Dettmers et al. 2022,
            arXiv 2208.07339). `int4` rounds every 128 neighbours in a row to 15 levels (round-to-nearest, the baseline
            of Frantar et al. 2022, arXiv 2210.17323).
        seed: Seed of the noise.
    """
    kept = {id(m.weight) for m in [*model.modules(), model.get_output_embeddings()] if _is_kept(m, model)}
    turned = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}  # GPT-2's matrices are `[in, out]`
    changed = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in kept]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        before = [p.detach().to("cpu", copy=True) for p in changed]
        for parameter in changed:
            is_turned = id(parameter) in turned
            values = _changed(parameter.T if is_turned else parameter, kind, generator)
            parameter.copy_(values.T if is_turned else values)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(changed, before, strict=True):
                parameter.copy_(values)


def _is_kept(module: nn.Module, model: PreTrainedModel) -> bool:
    return isinstance(module, nn.Embedding) or module is model.get_output_embeddings()


def _changed(weight: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    values = weight.float()
    if kind.startswith("noise_"):
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        return values + float(kind.removeprefix("noise_")) * values.std() * noise
    return rounded(values, levels=127, group=None) if kind == "int8" else rounded(values, levels=7, group=_GROUP)


def rounded(values: Tensor, levels: int, group: int | None) -> Tensor:
    """Round values to the nearest of `2 * levels + 1` multiples of a scale.

    Args:
        values: `[..., columns]` float32.
        group: Neighbours in a row that share a scale, which makes the largest magnitude of them the highest level; None
            for the whole row. A row that cannot be divided into groups is one group.
    """
    columns = values.shape[-1]
    size = columns if group is None or columns % group else group
    groups = values.reshape(*values.shape[:-1], columns // size, size)
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny) / levels
    return ((groups / scale).round() * scale).reshape(values.shape)
