"""The process group of a run, and the ranks that a launcher has given to this process."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import numpy as np
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.utils import groups

from selfgen_ds.errors import InputError
from selfgen_ds.ranks import environment
from selfgen_ds.ranks.heartbeat import Heartbeat

log = logging.getLogger("selfgen_ds")

T = TypeVar("T")
Number = TypeVar("Number", int, float)

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_JOIN_TIMEOUT = timedelta(minutes=15)
# Until steps begin, ranks wait in collectives for a rank that tokenizes or converts a checkpoint. Afterwards they wait
# for rank 0 at most, which ends a round or writes the exported model. A lost rank is noticed long before, by the
# heartbeat. DEEPSPEED_TIMEOUT, in minutes, is DeepSpeed's variable. DeepSpeed gathers parameters in groups of its own,
# which have torch's timeouts: 30 minutes for gloo, 10 for NCCL.
_START_TIMEOUT = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", 240)))
_RUN_TIMEOUT = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", 60)))

heartbeat: Heartbeat | None = None
"""The heartbeat of this process, from joining the process group to leaving it."""


def rank() -> int:
    """Return this process's rank, which the launcher's variables hold before the process group exists."""
    return int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0)))


def local_rank() -> int:
    """Return this process's rank among the ranks of its host."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)))


def world_size() -> int:
    """Return the number of ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", 1)))


def local_world_size() -> int:
    """Return the number of ranks on this host, or of all ranks if the launcher does not say."""
    return environment.local_ranks(os.environ) or world_size()


def device() -> torch.device:
    """Return this process's accelerator, or the CPU."""
    return torch.device(get_accelerator().current_device_name())


def init_process_group() -> None:
    """Join the process group of `deepspeed`, `torchrun`, `srun`, or `mpirun`, or make a group of this process alone.

    Collective: every rank must call this, because a group exists when all its ranks have joined.

    Raises:
        InputError: There are fewer ranks than started tasks, so that several groups would each train a model; rank 0
            cannot listen on `MASTER_PORT`, or another run listens there; or torchrun restarts ranks on several hosts.
    """
    if torch.distributed.is_initialized():
        return
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile this extension at first use, for a minute; only inference uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    several_agents = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
    if several_agents and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise InputError(
            "torchrun: --max_restarts works on one host: each host counts its own restarts, and the ranks do not find "
            "each other again"
        )
    mpi = "OMPI_COMM_WORLD_SIZE" in os.environ
    complete = all(name in os.environ for name in LAUNCHER_VARIABLES)
    ranks = world_size() if mpi or complete else 1
    # Set by Slurm's srun, and by an MPI other than Open MPI.
    tasks = max(int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "PMI_SIZE"))
    if tasks > ranks:
        raise InputError(
            f"{tasks} tasks were started, but {', '.join(LAUNCHER_VARIABLES)} say {ranks} "
            f"rank{'s' * (ranks > 1)}: several tasks would each train a model; start them with launch/slurm.sbatch"
        )
    if mpi and not complete:
        deepspeed.comm.mpi_discovery(os.environ.get("MASTER_PORT", TORCH_DISTRIBUTED_DEFAULT_PORT), verbose=False)
    elif not complete:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(free_port())
    get_accelerator().set_device(local_rank())
    _join()
    deepspeed.init_distributed(verbose=False)  # takes the group that exists


def _join() -> None:
    """Make the default process group, over a store that listens only on the address of `MASTER_ADDR`."""
    global heartbeat
    address, port = os.environ["MASTER_ADDR"], _port(os.environ["MASTER_PORT"])
    has_store = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listening = _listen(address, port) if has_store else None
    if listening is not None:
        address = listening.getsockname()[0]
    store = torch.distributed.TCPStore(
        address,
        port,
        world_size(),
        is_master=has_store,
        timeout=_JOIN_TIMEOUT,
        master_listen_fd=None if listening is None else listening.detach(),
    )
    # The store may be another run's, on the port that this run wanted. torchrun's store serves every restart of a run.
    # Only launch/ and torchrun set a variable that tells runs of the same size apart.
    run = os.environ.get("SELFGEN_DS_RUN", os.environ.get("TORCHELASTIC_RUN_ID", ""))
    prefix = f"{run}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{world_size()}"
    if store.add(f"{prefix}/joined/{rank()}", 1) > 1:  # before this rank writes what the other run would read
        raise InputError(f"MASTER_PORT: {port} at {address} is another run's, which has a rank {rank()}; choose a port")
    # Before the ranks connect, so that one that is lost meanwhile is noticed.
    heartbeat = Heartbeat(store, f"{prefix}/selfgen_ds", rank(), world_size(), has_store and world_size() > 1)
    cuda = get_accelerator().device_name() == "cuda"
    torch.distributed.init_process_group(
        get_accelerator().communication_backend_name(),
        store=torch.distributed.PrefixStore(prefix, store),
        rank=rank(),
        world_size=world_size(),
        timeout=_START_TIMEOUT,
        device_id=device() if cuda and world_size() > 1 else None,
    )


def shorten_timeout() -> None:
    """Let collectives of the default group fail after an hour from now on, because steps begin."""
    torch.distributed.distributed_c10d._set_pg_timeout(_RUN_TIMEOUT)


def _port(text: str) -> int:
    """Return the number of a port.

    Raises:
        InputError: The text is no port.
    """
    if not (text.isdecimal() and 0 < int(text) < 1 << 16):
        raise InputError(f"MASTER_PORT: expected a port, got {text!r}")
    return int(text)


def _listen(address: str, port: int) -> socket.socket | None:
    """Return a socket for the store, which by itself would listen on all interfaces.

    Returns:
        A socket that listens on one address, or None if the address is unclear: the store then listens on all.

    Raises:
        InputError: The address is unknown, or the port is taken.
    """
    try:
        family, _, _, _, endpoint = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InputError(f"MASTER_ADDR: {address}: {error.strerror}") from error
    # Many hosts resolve their own name to the loopback address.
    if str(endpoint[0]).startswith("127.") and world_size() > local_world_size():
        own = _addresses()
        if len(own) != 1:
            log.warning("MASTER_ADDR %s is %s on this host: the store listens on all interfaces", address, endpoint[0])
            return None
        endpoint = own[0], port
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(endpoint)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"MASTER_PORT: {port} is taken on {address}, perhaps by another run; set another port"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            log.warning("MASTER_ADDR %s is not an address of this host: the store listens on all interfaces", address)
            return None
        raise
    listening.listen(socket.SOMAXCONN)
    return listening


def _addresses() -> list[str]:
    """Return the IPv4 addresses of this host, or of the interface `GLOO_SOCKET_IFNAME`, without the loopback's."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    interfaces = [interface for name, interface in psutil.net_if_addrs().items() if chosen in (None, name)]
    addresses = [entry.address for entries in interfaces for entry in entries if entry.family == socket.AF_INET]
    return [address for address in addresses if not address.startswith("127.")]


def all_gather_object(value: T) -> list[T]:
    """Return the values of all ranks, by rank. Collective: every rank must call this.

    Args:
        value: This rank's value, which can be pickled.
    """
    values = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def gather_object(value: T) -> list[T]:
    """Return the values of all ranks on rank 0, by rank, and nothing elsewhere. Collective: every rank must call this.

    Args:
        value: This rank's value, which can be pickled.
    """
    values = [value] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(value, values)
    return values or []


def scatter_object(values: list[T]) -> T:
    """Return the value that rank 0 has for this rank. Collective: every rank must call this.

    Args:
        values: On rank 0, a value for every rank, which can be pickled; elsewhere nothing is read.
    """
    received: list[Any] = [None]
    torch.distributed.scatter_object_list(received, values if torch.distributed.get_rank() == 0 else None, src=0)
    return received[0]


def max_over_ranks(values: list[Number]) -> list[Number]:
    """Return the largest of the ranks' values, position by position. Collective: every rank must call this."""
    if torch.distributed.get_world_size() == 1:
        return values
    result = torch.from_numpy(np.array(values)).to(device())
    torch.distributed.all_reduce(result, op=torch.distributed.ReduceOp.MAX)
    return result.tolist()


def from_rank_0(compute: Callable[[], T]) -> T:
    """Return the value that rank 0 computes; no other rank calls `compute`. Collective: every rank must call this."""
    values: list[Any] = [compute() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def leave_node_group() -> None:
    """Destroy the group of `zero_hpz_partition_size`: DeepSpeed makes one per engine, and refuses to make a second.

    Collective: every rank must call this.
    """
    if (group := groups._get_zero_param_intra_parallel_group()) is not None:
        deepspeed.comm.destroy_process_group(group)


def leave_process_group(reason: str = "the rank had finished") -> None:
    """Leave the process group. At the interpreter's end gloo's threads could abort the process.

    Args:
        reason: Reason that the other ranks print if they do not leave too.
    """
    global heartbeat
    if heartbeat is not None:
        heartbeat.leave(reason)
        heartbeat = None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_port() -> int:
    """Return a port of this host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
