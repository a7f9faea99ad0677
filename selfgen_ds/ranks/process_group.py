"""Which process this is among those that a launcher started, and their process group."""

from __future__ import annotations

import errno
import logging
import os
import socket
from datetime import timedelta
from typing import TypeVar

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.utils import groups

from selfgen_ds.errors import InputError
from selfgen_ds.ranks.heartbeat import Heartbeat

log = logging.getLogger("selfgen_ds")

T = TypeVar("T")

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_JOIN_TIMEOUT = timedelta(minutes=15)
# For what one rank does while the others wait, such as tokenising. DeepSpeed's variable, which holds minutes; a lost
# rank is noticed long before, by its heartbeat.
_COLLECTIVE_TIMEOUT = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", 240)))

heartbeat: Heartbeat | None = None
"""Of this process, while it is in a group of several."""


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
    """Join the process group of `deepspeed`, `torchrun`, `srun` or `mpirun`, or make one of this process alone.

    Raises:
        InputError: Fewer ranks than tasks were started, so that several groups would each train a model of their own;
            rank 0 cannot listen on `MASTER_PORT`, or another run does; or torchrun restarts ranks on several hosts.
    """
    if torch.distributed.is_initialized():
        return
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile this at first use; it serves inference only, training's collectives are gloo's
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    several_agents = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
    if several_agents and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise InputError("torchrun: --max_restarts works on one host: each counts its own, and ranks miss each other")
    mpi = "OMPI_COMM_WORLD_SIZE" in os.environ
    complete = all(name in os.environ for name in _LAUNCHER_VARIABLES)
    ranks = world_size() if mpi or complete else 1
    # in a step of Slurm's srun, or under an MPI other than Open MPI
    tasks = max(int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "PMI_SIZE"))
    if tasks > ranks:
        raise InputError(
            f"{tasks} tasks were started, but {', '.join(_LAUNCHER_VARIABLES)} say {ranks} "
            f"rank{'s' * (ranks > 1)}: the tasks would train models of their own"
        )
    if mpi and not complete:
        deepspeed.comm.mpi_discovery(os.environ.get("MASTER_PORT", TORCH_DISTRIBUTED_DEFAULT_PORT), verbose=False)
    elif not complete:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    get_accelerator().set_device(local_rank())
    _join()
    deepspeed.init_distributed(verbose=False)  # in the group that there is


def _join() -> None:
    """The default process group, over a store that listens on the address of `MASTER_ADDR` alone."""
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
    # This may be the store of a run whose port ours wanted; torchrun's serves several runs, and outlives their ranks.
    # Only launch/ and torchrun tell runs of the same size apart.
    run = os.environ.get("SELFGEN_DS_RUN", os.environ.get("TORCHELASTIC_RUN_ID", ""))
    prefix = f"{run}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{world_size()}"
    if store.add(f"{prefix}/joined/{rank()}", 1) > 1:  # before anything there is changed
        raise InputError(f"MASTER_PORT: {port} at {address} is another run's, which has a rank {rank()}")
    cuda = get_accelerator().device_name() == "cuda"
    torch.distributed.init_process_group(
        get_accelerator().communication_backend_name(),
        store=torch.distributed.PrefixStore(prefix, store),
        rank=rank(),
        world_size=world_size(),
        timeout=_COLLECTIVE_TIMEOUT,
        device_id=device() if cuda and world_size() > 1 else None,
    )
    if world_size() > 1:
        heartbeat = Heartbeat(store, f"{prefix}/selfgen_ds", rank(), world_size(), has_store)


def _port(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) < 1 << 16):
        raise InputError(f"MASTER_PORT: expected a port, got {text!r}")
    return int(text)


def _listen(address: str, port: int) -> socket.socket | None:
    """A socket for the store, which by itself would listen on all interfaces; None where it has to."""
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InputError(f"MASTER_ADDR: {address}: {error.strerror}") from error
    if str(place[0]).startswith("127.") and world_size() > local_world_size():  # as many hosts know their own name
        own = _addresses()
        if len(own) != 1:
            log.warning("MASTER_ADDR %s is %s here: the store listens on all interfaces", address, place[0])
            return None
        place = own[0], port
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(place)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"MASTER_PORT: {port} is taken on {address}, by another run perhaps") from error
        if error.errno == errno.EADDRNOTAVAIL:
            log.warning("MASTER_ADDR %s is no address of this host: the store listens on all interfaces", address)
            return None
        raise
    listening.listen(socket.SOMAXCONN)
    return listening


def _addresses() -> list[str]:
    """Of this host's interfaces, or of the one that `GLOO_SOCKET_IFNAME` names, without the loopback."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    interfaces = {name: addresses for name, addresses in psutil.net_if_addrs().items() if chosen in (None, name)}
    found = [a.address for addresses in interfaces.values() for a in addresses if a.family == socket.AF_INET]
    return [address for address in found if not address.startswith("127.")]


def all_gather_object(mine: T) -> list[T]:
    """What every rank has, by rank. Collective."""
    found = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


def leave_node_group() -> None:
    """Of `zero_hpz_partition_size`: DeepSpeed makes it with an engine and refuses to make it twice."""
    if (group := groups._get_zero_param_intra_parallel_group()) is not None:
        deepspeed.comm.destroy_process_group(group)


def leave_process_group(why: str = "it was done") -> None:
    """Left to the interpreter's end, gloo's threads can bring it down with an abort.

    Args:
        why: For others that do not.
    """
    global heartbeat
    if heartbeat is not None:
        heartbeat.leave(why)
        heartbeat = None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
