"""Variables that have to be set before torch is loaded, and that launchers leave out."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

_LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")  # torchrun, deepspeed, Open MPI
_ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


def set_defaults(variables: MutableMapping[str, str]) -> None:
    """Set the number of threads and torch's allocator of CUDA memory, unless they are set.

    Without a number of threads, every rank of a host would start one for each core of the host. Without expandable
    segments, rounds that gather and release the whole model leave memory in pieces.
    """
    variables.setdefault("OMP_NUM_THREADS", str(_threads(variables)))
    if not _ALLOCATOR & variables.keys():
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def local_ranks(variables: MutableMapping[str, str]) -> int | None:
    """Return the number of ranks on this host, as the launcher says; None if it does not say."""
    return next((int(variables[name]) for name in _LOCAL_RANKS if name in variables), None)


def _threads(variables: MutableMapping[str, str]) -> int:
    """Return this rank's share of the cores that it may run on."""
    cores = _cores()
    if "SLURM_CPUS_PER_TASK" in variables:
        return min(cores, int(variables["SLURM_CPUS_PER_TASK"]))
    return max(1, cores // (local_ranks(variables) or 1))


def _cores() -> int:
    """Return the number of cores that this process may run on; threads of one core count once."""
    processors = os.sched_getaffinity(0)
    siblings = [Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") for number in processors]
    return len({path.read_text() if path.exists() else path for path in siblings})
