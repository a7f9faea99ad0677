"""Runs of `selfgen-ds` on ranks that are forked from a process with the slow imports done."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import set_start_method
from multiprocessing.connection import wait
from pathlib import Path

import torch

from tests.points import Point, arm, count
from tests.ranks import ENVIRONMENT, ROOT, forks, free_port


class Run:
    """A run of `selfgen-ds ARGUMENTS` on ranks of this machine.

    Args:
        folder: Folder of the ranks' logs, `rank-RANK.log`.
        broken: Points at which something happens to a rank, by rank.
        counts: Functions whose calls each rank counts, in the file `calls-RANK` of the same folder.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        ranks: int = 2,
        broken: dict[int, Point] | None = None,
        counts: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.port = folder, free_port()
        context = forks()
        self.processes = []
        for rank in range(ranks):
            point = (broken or {}).get(rank)
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            of_rank |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
            calls = counts, folder / f"calls-{rank}"
            process = context.Process(
                target=_command, args=(arguments, self.log(rank), of_rank, point, *calls), daemon=True
            )
            process.start()
            self.processes.append(process)
        self.ended: dict[int, float] = {}
        """When a rank ended, in seconds of `time.monotonic`, by rank."""

    def log(self, rank: int) -> Path:
        """Return the path of a rank's log."""
        return self.folder / f"rank-{rank}.log"

    def output(self, rank: int) -> str:
        """Return what a rank has printed so far."""
        return self.log(rank).read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Wait for the ranks, and return their exit codes by rank.

        Raises:
            AssertionError: The ranks did not end in time, and were killed.
        """
        deadline = time.monotonic() + timeout
        while len(self.ended) < len(self.processes):
            open_ = [p.sentinel for rank, p in enumerate(self.processes) if rank not in self.ended]
            if not wait(open_, max(0.0, deadline - time.monotonic())):
                self.kill()
                logs = "\n".join(self.output(rank)[-2000:] for rank in range(len(self.processes)))
                raise AssertionError(f"did not end within {timeout} s:\n{logs}")
            for rank, process in enumerate(self.processes):
                if rank not in self.ended and not process.is_alive():
                    self.ended[rank] = time.monotonic()
        return [process.exitcode or 0 for process in self.processes]

    def until(self, reached: Callable[[], bool], timeout: float = 120.0) -> None:
        """Wait until `reached()` is true, while all ranks run."""
        deadline = time.monotonic() + timeout
        while not reached():
            assert all(process.is_alive() for process in self.processes), self.output(0)[-3000:]
            assert time.monotonic() < deadline, self.output(0)[-3000:]
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill every rank."""
        for process in self.processes:
            process.kill()
            process.join()


def command(arguments: list[str], log: Path, variables: dict[str, str] | None = None) -> int:
    """Run `selfgen-ds ARGUMENTS` in one process, without a launcher, and return its exit code.

    Args:
        variables: Variables to add to the environment of the fork server, which may differ from the caller's.
    """
    process = forks().Process(target=_command, args=(arguments, log, variables or {}), daemon=True)
    process.start()
    process.join(60.0)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"did not end in time:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return process.exitcode


def _command(
    arguments: list[str],
    log: Path,
    variables: dict[str, str],
    point: Point | None = None,
    counts: tuple[str, ...] = (),
    calls: Path | None = None,
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    os.environ |= ENVIRONMENT | variables
    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # as in a launched process; "forkserver" would name its semaphores
    from selfgen_ds.cli import main

    counted = count(counts)
    if point is not None:
        arm(point)
    sys.argv = ["selfgen-ds", *arguments]
    try:
        main()
    finally:
        if calls is not None:
            calls.write_text(json.dumps(counted()))
