"""launch/mpirun.sh: its checks, the arguments and variables of the ranks, and signals."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Host
from tests.cluster.watching import HOSTILE, environment, losses, nothing_is_left, wait_until


@pytest.mark.parametrize("where", ["", "none", "0"])
def test_an_argument_that_is_neither_a_number_nor_a_hostfile_is_one_clear_line(
    nodes: list[Host], recipe: Path, where: str
) -> None:
    with nodes[0].launch("launch/mpirun.sh", where, recipe, log=recipe.with_name("log")) as run:
        assert run.wait() == 2
    assert run.output() == f"mpirun.sh: error: {where}: expected a number of ranks or a hostfile that can be read\n"


@pytest.mark.parametrize(
    ("options", "arguments", "problem"),
    [
        ([], ["none.yaml"], "none.yaml"),
        ([], ["recipes/demo.yaml", "--train.max_step", "3"], "--train.max_step: no such setting"),
        ([], ["recipes/demo.yaml", "--deepspeed", "none.json"], "none.json"),
        (["--dry-run"], ["none.yaml"], "none.yaml"),
    ],
    ids=["recipe", "setting", "JSON", "dry run"],
)
def test_a_recipe_that_cannot_be_parsed_starts_nothing(
    nodes: list[Host], recipe: Path, options: list[str], arguments: list[str], problem: str
) -> None:
    with nodes[0].launch("launch/mpirun.sh", *options, "2", *arguments, log=recipe.with_name("log")) as run:
        assert run.wait() == 2
    (line,) = run.output().splitlines()
    assert line.startswith("mpirun.sh: error: ")
    assert problem in line


def test_a_port_that_is_taken_ends_all_ranks(nodes: list[Host], recipe: Path, hostfile: Path) -> None:
    command = ["launch/mpirun.sh", hostfile, recipe]
    started = time.monotonic()
    with nodes[0].launch(*command, log=recipe.with_name("log"), GLOO_SOCKET_IFNAME="eth0", MASTER_PORT="22") as run:
        assert run.wait() == 2, run.output()[-3000:]
    assert "selfgen-ds: error: MASTER_PORT: 22 is taken on 10.77.0.1" in run.output()
    assert time.monotonic() - started < 60


def test_ranks_share_the_cores(nodes: list[Host], recipe: Path) -> None:
    alone = nodes[0].run("launch/mpirun.sh", "--dry-run", "1", recipe)
    cores = int(alone.split("--map-by slot:PE=")[1].split()[0])
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    shared = nodes[0].run("launch/mpirun.sh", "--dry-run", str(cores), recipe)
    assert "--map-by slot:PE=1 --bind-to core" in shared
    too_many = nodes[0].run("launch/mpirun.sh", "--dry-run", str(cores + 1), recipe)
    assert "--oversubscribe --bind-to none" in too_many


def test_arguments_arrive_byte_for_byte_and_a_signal_stops_the_ranks(
    nodes: list[Host], recipe: Path, hostfile: Path
) -> None:
    out = recipe.parent / HOSTILE.replace("*", "")  # output_dir may not contain a star
    command = ["launch/mpirun.sh", hostfile, recipe, "--output_dir", out, "--train.max_steps", "100000"]
    variables = {"GLOO_SOCKET_IFNAME": "eth0", "HF_X": HOSTILE, "MASTER_PORT": "29600"}
    with nodes[0].launch(*command, log=recipe.with_name("log"), **variables) as run:
        wait_until(lambda: len(losses(out)) >= 2, run)
        assert "10.77.0.1:29600" in nodes[0].run("ss", "--numeric", "--tcp", "--listening")
        for host in nodes:
            (rank,) = host.ranks()
            assert str(out) in Path(f"/proc/{rank}/cmdline").read_bytes().decode().split("\0")
            assert environment(rank)["HF_X"] == HOSTILE
        nodes[0].signal(run, signal.SIGTERM)
        assert run.wait() == 3, run.output()[-3000:]
    steps = len(losses(out))
    assert (out / "checkpoints" / f"step-{steps:06d}" / "complete.json").exists()
    wait_until(lambda: nothing_is_left(nodes), timeout=10)
