"""The heartbeat: ranks that are killed, that end alone, or that are suspended."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from selfgen_ds.config import SelfgenConfig, to_yaml
from selfgen_ds.errors import InputError
from selfgen_ds.methods.scheduled_sampling import ScheduledSampling
from selfgen_ds.ranks import heartbeat, process_group
from selfgen_ds.ranks.watch import Watch
from tests.distributed import runs
from tests.faults import NOTICED_WITHIN
from tests.forked import Run, command
from tests.points import Point
from tests.ranks import Launched, Ranks, free_port
from tests.tiers import matrix

HOST = socket.gethostname()


def start(folder: Path, ranks: int, broken: dict[int, Point] | None = None, **changes: Any) -> Run:
    settings = runs.recipe(folder, **changes)
    (folder / "recipe.yaml").write_text(to_yaml(settings))
    return Run(["train", "--config", str(folder / "recipe.yaml")], folder, ranks=ranks, broken=broken)


def test_all_other_ranks_name_the_one_that_was_killed(folder: Path) -> None:
    run = start(folder, 3, {2: Point(function="selfgen_ds.train:train_step", call=2)})
    assert run.wait() == [1, 1, -signal.SIGKILL]
    for rank in range(2):
        assert f"rank 2 on {HOST} is gone: its process died; rank {rank} on {HOST} ends" in run.output(rank)


def test_a_rank_that_is_killed_while_the_ranks_connect_is_named(folder: Path) -> None:
    run = start(folder, 2, {1: Point(function="torch.distributed:init_process_group")})
    assert run.wait() == [1, -signal.SIGKILL]
    assert f"rank 1 on {HOST} is gone: its process died; rank 0 on {HOST} ends" in run.output(0)


class EndsAlone(ScheduledSampling):
    """A method that fails with bad input in the third step, on the rank whose number is the run's seed."""

    def contexts(self, batches: Any, policy: Any, step: int) -> Any:
        if step == 2 and dist.get_rank() == self.plan.seed:
            raise InputError("no such row")
        return super().contexts(batches, policy, step)


@matrix("alone", [1, 0])
def test_a_rank_that_ends_without_the_others_is_named_with_its_reason(folder: Path, alone: int) -> None:
    run = start(folder, 2, selfgen=SelfgenConfig(method=f"{__name__}:EndsAlone"), seed=alone)
    codes = run.wait()
    assert (codes[alone], codes[1 - alone]) == (2, 1)
    assert abs(run.ended[0] - run.ended[1]) < NOTICED_WITHIN
    assert f"rank {alone} on {HOST} has ended without the others: error: no such row" in run.output(1 - alone)


@pytest.mark.slow
def test_a_run_on_the_port_of_another_one_is_refused_and_leaves_that_alone(folder: Path) -> None:
    settings = runs.recipe(folder)
    settings.train.max_steps = 100_000
    (folder / "recipe.yaml").write_text(to_yaml(settings))
    first = Run(["train", "--config", str(folder / "recipe.yaml")], folder)
    try:
        metrics = Path(settings.output_dir) / "metrics.jsonl"
        first.until(lambda: runs.count_lines(metrics) > 0)
        second = ["train", "--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / "second")]
        for rank, problem in enumerate(
            ["is taken on 127.0.0.1, perhaps by another run", "at 127.0.0.1 is another run's"]
        ):
            of_rank = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            assert command(second, folder / "log", of_rank | {"MASTER_PORT": str(first.port)}) == 2
            assert f"MASTER_PORT: {first.port} {problem}" in (folder / "log").read_text()
        lines = runs.count_lines(metrics)
        first.until(lambda: runs.count_lines(metrics) > lines + 5)
    finally:
        first.kill()


@pytest.mark.slow
def test_rank_0_waits_for_ranks_that_are_slow_to_end(folder: Path) -> None:
    at_the_end = Point(function="selfgen_ds.ranks.process_group:leave_process_group", signal=signal.SIGSTOP)
    run = start(folder, 2, {1: at_the_end})
    slow = psutil.Process(run.processes[1].pid)
    run.until(lambda: slow.status() == psutil.STATUS_STOPPED)
    time.sleep(3)
    assert run.processes[0].is_alive()
    slow.resume()
    assert run.wait() == [0, 0], run.output(0)


def shorten_silence() -> int:
    heartbeat._SILENCE = 3
    return os.getpid()


def sum_of_ranks() -> int:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return int(total)


@pytest.mark.slow
def test_ranks_that_were_stopped_together_continue() -> None:
    ranks = Ranks(2)
    try:
        processes = ranks.run(shorten_silence)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                os.kill(process, number)
            time.sleep(8)  # long enough for a wrong verdict, both while they are stopped and afterwards
        assert ranks.run(sum_of_ranks) == [1, 1]
    finally:
        ranks.stop()


@matrix("rank", [0, 1])  # rank 0: its store no longer answers; rank 1: it sends no more signs of life
def test_a_rank_that_is_stopped_alone_is_given_up(rank: int) -> None:
    ranks = Ranks(2)
    try:
        os.kill(ranks.run(shorten_silence)[rank], signal.SIGSTOP)
        ranks.begin(sum_of_ranks)
        deadline = time.monotonic() + 30
        while ranks.busy():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        ranks.stop()


def wait_in_vain() -> None:
    """Enter a collective on rank 0 alone, with a time limit for collectives under way of 2 seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_group, "_RUN_TIMEOUT", timedelta(seconds=2))
        with Watch(600.0, saving=60.0) as watch:
            watch.begin(torch.nn.Linear(1, 1))
            if dist.get_rank() == 0:
                with pytest.raises(RuntimeError, match="Timed out waiting 2000ms"):
                    process_group.all_gather_object(0)
            else:
                time.sleep(4)


def test_collectives_time_out_sooner_once_steps_have_begun() -> None:
    ranks = Ranks(2)
    try:
        ranks.run(wait_in_vain, timeout=60.0)
    finally:
        ranks.stop()


@pytest.mark.slow
def test_torchrun_starts_lost_ranks_again(folder: Path) -> None:
    settings = runs.recipe(folder, resume="auto")
    settings.train.max_steps, settings.checkpoint.every = 16, 4
    (folder / "recipe.yaml").write_text(to_yaml(settings))
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node=2", "--max_restarts=1"]
    command = [*torchrun, f"--master_port={free_port()}", "-m", "selfgen_ds", "train", "--config"]
    metrics = Path(settings.output_dir) / "metrics.jsonl"
    with Launched([*command, str(folder / "recipe.yaml")], folder / "log") as run:
        while runs.count_lines(metrics) < 5:
            assert run.process.poll() is None, run.output()[-3000:]
            time.sleep(0.05)
        ranks = psutil.Process(run.process.pid).children()
        assert len(ranks) == 2
        ranks[1].kill()
        assert run.wait() == 0, run.output()[-3000:]
    assert "resumed from" in run.output()
    assert runs.count_lines(metrics) == 16
