"""Which process this is among those that a launcher started, and their process group."""

from __future__ import annotations

import os
import socket

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from selfgen_ds.config import InputError

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """This process's rank, known before the process group exists."""
    return int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0)))


def local_rank() -> int:
    """This process's rank on its host."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)))


def world_size() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", 1)))


def local_world_size() -> int:
    """Number of those on this host; where the launcher does not say, as if all were."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")  # torchrun, deepspeed, Open MPI
    return int(next((os.environ[name] for name in names if name in os.environ), world_size()))


def device() -> torch.device:
    """The accelerator of this process."""
    return torch.device(get_accelerator().current_device_name())


def init_process_group() -> None:
    """Join the process group of `deepspeed`, `torchrun` or `mpirun`, or make one of this process alone.

    Raises:
        InputError: Several tasks were started without rank variables; each would train a model of its own.
    """
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile this at first use; it serves inference only, training's collectives are gloo's
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "OMPI_COMM_WORLD_SIZE" not in os.environ and not all(v in os.environ for v in _LAUNCHER_VARIABLES):
        # in a step of Slurm's srun, or under an MPI other than Open MPI
        tasks = max(int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "PMI_SIZE"))
        if tasks > 1:
            raise InputError(
                f"{tasks} tasks were started, but {', '.join(_LAUNCHER_VARIABLES)} are not all set: "
                "each task would train a model of its own"
            )
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
    get_accelerator().set_device(local_rank())
    deepspeed.init_distributed(verbose=False)


def leave_node_group() -> None:
    """Of `zero_hpz_partition_size`: DeepSpeed makes it with an engine and refuses to make it twice."""
    if (group := groups._get_zero_param_intra_parallel_group()) is not None:
        deepspeed.comm.destroy_process_group(group)


def leave_process_group() -> None:
    """Left to the interpreter's end, gloo's threads can bring it down with an abort."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
