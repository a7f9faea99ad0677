"""Whether the hosts of a run see the same output folder."""

from __future__ import annotations

import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from selfgen_ds.ranks import process_group


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Who keeps what in an output folder."""

    shared: bool
    """Whether all ranks see the same folder; otherwise every host has a part of each checkpoint."""
    writes: bool
    """Whether this rank makes, marks and removes folders: rank 0, or where they are not shared the first of a host."""


def find_out(folder: Path) -> Storage:
    """Have all ranks look for a file that rank 0 makes. Collective."""
    rank, name = dist.get_rank(), [f".{uuid.uuid4().hex}.tmp"]
    dist.broadcast_object_list(name, src=0)
    probe = folder / name[0]
    if rank == 0:
        probe.touch()
    dist.barrier()
    with suppress(OSError):  # a host without the folder is one that does not share it
        folder.mkdir(parents=True, exist_ok=True)  # asks a server whose folder was not there a moment ago
    shared = all(process_group.all_gather_object(probe.exists()))
    if rank == 0:
        probe.unlink()
    return Storage(shared=shared, writes=(rank if shared else process_group.local_rank()) == 0)
