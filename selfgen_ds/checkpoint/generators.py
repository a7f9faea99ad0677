"""The states of torch's random generators, in one file per rank."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from selfgen_ds.checkpoint import unpickling


def save_generators(path: Path, device: torch.device) -> None:
    """Write the states of this rank's generators into the checkpoint at `path`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    torch.save(states, _file(path))


def restore_generators(path: Path, device: torch.device) -> None:
    """Put torch's generators into the states that this rank saved in the checkpoint at `path`."""
    states = unpickling.load(_file(path))
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _file(path: Path) -> Path:
    return path / f"generators_rank_{dist.get_rank()}.pt"
