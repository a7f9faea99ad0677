"""Packed rows: no sample sees another one, and what packing costs under every implementation of attention."""

from __future__ import annotations

import time
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gpu_checks.rows import Report
from selfgen_ds.model import attention
from selfgen_ds.model.reductions import add_reductions, backbone, packed_settings

_IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3", attention.FLEX)
_SAMPLES = 4  # in a packed row
_MOST_TIME = {2048: (1.0, 1.4), 8192: (1.5, 2.5)}
"""Length -> expected time of packed rows under sdpa, which reads them through a mask, divided by unpacked rows."""


def check(report: Report) -> None:
    """Read rows of several lengths, packed and as one sample, with every implementation that this machine has."""
    for name in _IMPLEMENTATIONS:
        if reason := attention.problem(name, on_cpu=report.device == "cpu", trains=True):
            report.skipped(f"{name}, packed", reason)
            continue
        lengths = report.sizes.packed_lengths
        for length in lengths[-1:] if name == attention.FLEX else lengths:  # which is compiled anew for every length
            _compare(report, name, length)


def _compare(report: Report, name: str, length: int) -> None:
    model = _model(report, name)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    sample = length // _SAMPLES
    packed = packed_settings(model, torch.arange(sample).repeat(_SAMPLES)[None])
    others = ids.clone()
    others[:, :sample] = (others[:, :sample] + 1) % model.config.vocab_size
    with torch.no_grad():
        whole = _hidden(model, ids, packed)[:, sample:]
        beside_others = _hidden(model, others, packed)[:, sample:]
        alone = torch.cat([_hidden(model, part) for part in ids.split(sample, dim=1)[1:]], dim=1)
    leak = float((whole - beside_others).abs().max())
    what = f"{name}, {_SAMPLES} samples in {length} tokens"
    report.result(f"{what}: change of a sample by another's tokens", "0", f"{leak:.1e}", leak == 0.0)
    apart, most = float((whole - alone).norm() / alone.norm()), 1e-5 if model.dtype == torch.float32 else 3e-2
    report.result(f"{what}: difference to the samples alone", f"at most {most:g}", f"{apart:.1e}", apart <= most)
    seconds = {kind: _seconds(model, ids, settings) for kind, settings in (("packed", packed), ("one", None))}
    ratio = seconds["packed"] / seconds["one"]
    expected = _MOST_TIME.get(length) if name == "sdpa" else (0.3, 1.2)
    report.figure(f"{what}: forward and backward", 1000 * seconds["packed"], "ms")
    report.figure(f"{what}: divided by one sample of this length under the same attention", ratio, "", expected)


def _model(report: Report, name: str) -> PreTrainedModel:
    config = AutoConfig.for_model("llama", vocab_size=1024, **report.sizes.packed_model)
    torch.manual_seed(0)
    with torch.device(report.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, report.sizes.dtype), attn_implementation=name
        )
    return add_reductions(model)


def _hidden(model: PreTrainedModel, ids: Tensor, packed: dict[str, Any] | None = None) -> Tensor:
    """Return the hidden states of the last layer, `[1, length, hidden]`."""
    hidden: Tensor = backbone(model, ids, packed).last_hidden_state
    return hidden


def _seconds(model: PreTrainedModel, ids: Tensor, packed: dict[str, Any] | None) -> float:
    """Return the median time of a forward and a backward of the layers."""
    times = []
    for turn in range(6):
        get_accelerator().synchronize()
        started = time.perf_counter()
        _hidden(model, ids, packed).float().square().mean().backward()
        get_accelerator().synchronize()
        if turn:  # the first turn compiles or sets up kernels
            times.append(time.perf_counter() - started)
        model.zero_grad()
    return sorted(times)[len(times) // 2]
