"""Ranks for tests: processes of one process group that run functions of the test modules, and launched commands."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """A process group that serves many tests, because starting one takes longer than most tests.

    A call that fails on some of the ranks, or does not finish in time, kills the group; the next call starts a new one.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        """Call `function(*arguments)` on every rank at once, and return the results by rank.

        Raises:
            AssertionError: The function raised an exception on a rank, or a rank died.
            TimeoutError: A rank did not finish within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        self.begin(function, *arguments)
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                failures += [
                    failure for other in self._pipes[rank + 1 :] if other.poll() and (failure := other.recv()[0])
                ]
                self.stop()
                late = f"{function.__name__}: rank {rank} did not finish within {timeout} s"
                raise TimeoutError("\n".join([late, *failures]))
            try:
                failure, result = pipe.recv()
            except EOFError:
                failure, result = "died", None
            results.append(result)
            if failure:
                failures.append(f"rank {rank}: {failure}")
        if failures:
            if len(failures) < self.world_size or any(failure.endswith(": died") for failure in failures):
                self.stop()  # the ranks are no longer at the same collective, or there are none
            raise AssertionError("\n".join(failures))
        return results

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Start a function on every rank, and return at once. Only `busy` and `stop` may follow."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))

    def busy(self) -> bool:
        """Return whether every rank is still running its function."""
        return not any(pipe.poll() for pipe in self._pipes)

    def stop(self) -> None:
        """Kill every rank."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context, port = forks(), free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world_size, port), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)


def forks() -> ForkServerContext:
    """Return a context whose new processes have the slow imports done already."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    os.environ |= ENVIRONMENT | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.chdir(ROOT)
    import logging
    import warnings

    import torch

    from selfgen_ds.ranks import process_group

    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("selfgen_ds").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", category=FutureWarning)
    process_group.init_process_group()
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        result: tuple[str | None, Any]
        try:
            result = (None, function(*arguments))
        except BaseException:
            result = (traceback.format_exc(), None)
        pipe.send(result)


class Launched:
    """A command that runs in its own session, with its output in a file. Leaving the context kills the session."""

    def __init__(self, command: list[str], log: Path, timeout: float = 240.0) -> None:
        self.log = log
        self.deadline = time.monotonic() + timeout
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self) -> int:
        """Wait for the command, and return its exit code.

        Raises:
            AssertionError: The command did not end in time. The message holds the end of its output.
        """
        try:
            return self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise AssertionError(f"did not end in time:\n{self.output()[-3000:]}") from error

    def kill(self) -> None:
        """Kill every process of the session: the launcher and the ranks."""
        for process in _session(self.process.pid):
            os.kill(process, signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        """Return what the command has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def _session(leader: int) -> list[int]:
    """Return the processes of a session. A process group would not do: DeepSpeed's launcher makes one per rank."""
    processes = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            processes.append(int(entry.name))
    return processes


def deepspeed(arguments: list[str], log: Path, ranks: int = 2, timeout: float = 240.0) -> Launched:
    """Start `deepspeed --num_accelerators RANKS --module selfgen_ds ARGUMENTS`."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    options = ["--num_accelerators", str(ranks), "--master_port", str(free_port()), "--module", "selfgen_ds"]
    return Launched([launcher, *options, *arguments], log, timeout)
