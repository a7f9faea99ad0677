"""How exact are loss and gradients of the LM head in bfloat16? docs/cost-details.md has the table.

    python benchmarks/head_precision.py [--device cuda] [--vocabulary 32768 131072] [--positions 1024] [--width 512]

Compares, for several numbers of chunks, the project's loss and torch's chunked one with a float32 loss of whole
bfloat16 logits. Errors are relative, in the norm, against float64 on the same bfloat16 inputs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfgen_ds.model import cross_entropy
from selfgen_ds.model.cross_entropy import Projection, cross_entropies

_CHUNKS = (1, 8, 32, 128)
_POLICIES: tuple[Literal["accurate", "auto"], ...] = ("accurate", "auto")
Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    print("| words | loss | chunks | error of the loss | of the hidden states' gradient | of the head's | time |")
    print("|---|---|---|---|---|---|---|")
    for vocabulary in options.vocabulary:
        first = None
        for row in measure(options.positions, options.width, vocabulary, options.device):
            first = first or row.seconds
            shown = " | ".join(f"{error:.1e}" for error in (row.loss_error, row.hidden_error, row.head_error))
            print(f"| {vocabulary} | {row.loss} | {row.chunks} | {shown} | {row.seconds / first:.2f} |", flush=True)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way to compute the loss: its errors, relative to float64, and the time of forward and backward."""

    loss: str
    chunks: int
    loss_error: float
    hidden_error: float
    """Error of the gradient with respect to the hidden states."""
    head_error: float
    """Error of the gradient with respect to the head's weight."""
    seconds: float


def measure(positions: int, width: int, vocabulary: int, device: str) -> Iterator[Measured]:
    """Measure every loss on the same random inputs; the float32 loss of whole logits comes first."""
    hidden, weight, targets = inputs(positions, width, vocabulary, device)
    losses = _losses(targets, vocabulary)
    exact = _values(losses[0][2], hidden.double(), weight.double())
    for name, chunks, loss in losses:
        _values(loss, hidden, weight)  # the first call sets up kernels
        started = time.perf_counter()
        found = _values(loss, hidden, weight)
        seconds = time.perf_counter() - started
        of_loss, of_hidden, of_head = (
            float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)
        )
        yield Measured(
            loss=name,
            chunks=chunks,
            loss_error=of_loss,
            hidden_error=of_hidden,
            head_error=of_head,
            seconds=seconds,
        )


def inputs(positions: int, width: int, vocabulary: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return random hidden states and a head's weight, both in bfloat16, and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    return hidden.to(device, torch.bfloat16), weight.to(device, torch.bfloat16), targets.to(device)


def _losses(targets: Tensor, vocabulary: int) -> list[tuple[str, int, Loss]]:
    """Return the losses to compare, each with its name and its number of chunks; whole logits come first."""
    found: list[tuple[str, int, Loss]] = [("float32 loss of whole logits", 1, lambda h, w: _whole(h, w, targets))]
    for chunks in _CHUNKS:
        found.append(("ours, chunks of the vocabulary", chunks, _ours(targets, vocabulary, chunks)))
        if hasattr(F, "linear_cross_entropy"):
            found += [
                (f"torch's `{policy}`, chunks of positions", chunks, _torchs(targets, chunks, policy))
                for policy in _POLICIES
            ]
    return found


def _whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="sum")


def _ours(targets: Tensor, vocabulary: int, chunks: int) -> Loss:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        cross_entropy._ELEMENTS[hidden.device.type] = len(hidden) * vocabulary // chunks
        return cross_entropies(hidden, Projection(weight=weight, bias=None, cap=None), targets, 0.0).sum()

    return loss


def _torchs(targets: Tensor, chunks: int, policy: Literal["accurate", "auto"]) -> Loss:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=len(hidden) // chunks, chunking_method=None, acc_policy=policy
        )
        losses = F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)
        return losses.float().sum()

    return loss


def _values(loss: Loss, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Return the loss and its gradients with respect to the hidden states and the weight."""
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    if hidden.device.type == "cuda":
        torch.cuda.synchronize()
    return value.detach(), *gradients


if __name__ == "__main__":
    main()
