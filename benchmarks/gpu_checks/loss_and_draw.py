"""The loss and the draws at the LM head in bfloat16: errors against float64 and float32, and times."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from head_precision import inputs, measure
from torch import Tensor

from gpu_checks.rows import Report
from selfgen_ds.model import head
from selfgen_ds.model.cross_entropy import Projection


def check(report: Report) -> None:
    """Check the loss and its gradients, then draws, at the size of a large model's head."""
    sizes = report.sizes
    shape = sizes.head_positions, sizes.head_width, sizes.head_vocabulary, report.device
    if not hasattr(F, "linear_cross_entropy"):
        report.skipped("torch's linear_cross_entropy", f"torch {torch.__version__} has none")
    _losses(report, *shape)
    hidden, weight, _ = inputs(*shape)
    _draws(report, hidden, Projection(weight=weight, bias=None, cap=None))


def _losses(report: Report, *shape: int | str) -> None:
    """Compare with the float32 loss of whole logits, whose own rounding to bfloat16 nothing can avoid."""
    whole = None
    for row in measure(*shape):  # type: ignore[arg-type]
        name = f"{row.loss}, {row.chunks}"
        whole = whole or row
        errors = f"{row.loss_error:.1e}, {row.hidden_error:.1e}, {row.head_error:.1e}"
        if not row.loss.startswith("ours"):
            report.shown(f"{name}: errors of loss and gradients", errors)
        else:
            most = [1.2 * whole.hidden_error + 1e-4, 1.2 * whole.head_error + 1e-4]
            expected = f"gradients at most {most[0]:.1e}, {most[1]:.1e}"
            holds = row.loss_error < 1e-3 and row.hidden_error <= most[0] and row.head_error <= most[1]
            report.result(f"{name}: errors of loss and gradients", expected, errors, holds)
        ours_at_a_useful_size = (55.0, 140.0) if row.loss.startswith("ours") and row.chunks in (8, 32) else None
        report.figure(f"{name}: forward and backward", 1000 * row.seconds, "ms", ours_at_a_useful_size)


def _draws(report: Report, hidden: Tensor, project: Projection) -> None:
    """Check where each uniform falls in the distribution that float32 gives, and time chunks of several sizes."""
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand(len(hidden), generator=generator, dtype=torch.float64).to(hidden.device)
    draw = head.draw(uniforms, temperature=1.0, top_p=1.0, top_k=0)
    seconds = {}
    for chunk in report.sizes.draw_chunks:
        head._DRAW_CHUNK = head._DRAW_CHUNK_ON_ACCELERATORS = chunk
        draw(hidden, project)  # the first call sets up kernels
        get_accelerator().synchronize()
        started = time.perf_counter()
        tokens = draw(hidden, project)
        get_accelerator().synchronize()
        seconds[chunk] = time.perf_counter() - started
        assert isinstance(tokens, Tensor)
        off = _distance(hidden, project.weight, tokens, uniforms)
        report.result(f"draws, {chunk} at a time: farthest from its uniform", "at most 1e-3", f"{off:.1e}", off <= 1e-3)
        report.figure(f"draws, {chunk} at a time", 1000 * seconds[chunk], "ms")
    few, many = report.sizes.draw_chunks[0], report.sizes.draw_chunks[-2]
    report.figure(f"draws, {many} at a time divided by {few}", seconds[many] / seconds[few], "", (0.2, 0.7))


def _distance(hidden: Tensor, weight: Tensor, tokens: Tensor, uniforms: Tensor) -> float:
    """Return the largest distance of a uniform from its token's part of the cumulative distribution in float32."""
    farthest, whole = 0.0, weight.float().T
    for some, drawn, wanted in zip(hidden.split(256), tokens.split(256), uniforms.split(256), strict=True):
        probabilities = (some.float() @ whole).double().softmax(dim=1)
        upper = probabilities.cumsum(dim=1).gather(1, drawn[:, None])[:, 0]
        lower = upper - probabilities.gather(1, drawn[:, None])[:, 0]
        outside = torch.maximum(lower - wanted, wanted - upper)
        farthest = max(farthest, float(outside.max()))
    return max(farthest, 0.0)
