"""The work of a step on the device asks for no value: it runs on tensors that have shapes but no data.

There is one exception: transformers asks in every forward whether the rows are packed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from selfgen_ds.model import head
from selfgen_ds.model.reductions import add_reductions, places_of

META = torch.device("meta")


def _model(dtype: torch.dtype, device: torch.device = META) -> Any:
    fields = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, **fields, attn_implementation="sdpa")
    with device:
        return add_reductions(LlamaForCausalLM(config).to(dtype))


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers take it for granted that rows are not packed."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


def _rows() -> tuple[Tensor, Tensor]:
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 3:7] = True
    return torch.zeros(2, 8, dtype=torch.int64), mask


def test_a_value_of_the_device_cannot_be_asked_for_here() -> None:
    value = torch.ones(3, device=META)
    with pytest.raises(RuntimeError):
        value.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        value[value > 0]


class Questions(TorchDispatchMode):
    """Counts the operations whose results the host has to see."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts.update([name] if name in ("_local_scalar_dense", "nonzero", "masked_select") else [])
        return func(*args, **(kwargs or {}))


def test_transformers_asks_once_a_forward_whether_the_rows_are_packed() -> None:
    model = _model(torch.float32, torch.device("cpu"))
    context, mask = _rows()
    places, reduction = places_of(mask), head.loss_sum(context[mask], 0.0)
    with Questions() as questions:
        model(context, positions=places, reduction=reduction).backward()
    assert questions.counts == {"_local_scalar_dense": 1}


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"dft": True}, {"weighted": True}], ids=str)
def test_forward_and_backward_of_a_step_wait_for_nothing(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    model = _model(dtype)
    context, mask = _rows()
    targets = context[mask].to(META)
    weights = torch.ones(len(targets), device=META) if settings.get("weighted") else None
    reduction = head.loss_sum(targets, settings.get("label_smoothing", 0.0), weights, settings.get("dft", False))
    loss = model(context.to(META), positions=places_of(mask).to(META), reduction=reduction)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("settings", [(1.0, 1.0, 0), (0.7, 0.9, 0), (2.0, 1.0, 5)], ids=str)
def test_the_pass_waits_for_nothing(settings: tuple[float, float, int]) -> None:
    context, mask = _rows()
    uniforms = torch.empty(int(mask.sum()), dtype=torch.float64, device=META)
    reduction = head.draw(uniforms, *settings)
    with torch.no_grad():
        tokens = _model(torch.float32)(context.to(META), positions=places_of(mask).to(META), reduction=reduction)
    assert (tokens.shape, tokens.dtype) == (uniforms.shape, torch.int64)
