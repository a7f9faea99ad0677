"""Every launcher gives the same run on two hosts as on one, from the same seed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from selfgen_ds.config import to_yaml
from tests.cluster.hosts import Host, far_apart
from tests.cluster.slurm import Slurm
from tests.cluster.watching import losses
from tests.distributed import runs
from tests.forked import Run
from tests.ranks import free_port

STEPS = 4
ROUND_TRIP = """if True:
    import socket, time
    started = time.monotonic()
    socket.create_connection(("node2", 22))
    print(time.monotonic() - started)
"""


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of a run of two ranks on one host."""
    folder = tmp_path_factory.mktemp("one_host")
    runs.write_rows(folder)
    settings = runs.recipe(folder)
    (folder / "recipe.yaml").write_text(to_yaml(settings))
    run = Run(["train", "--config", str(folder / "recipe.yaml")], folder)
    assert run.wait() == [0, 0], run.output(0)[-3000:]
    found = losses(Path(settings.output_dir))
    assert len(found) == STEPS
    return found


def test_mpirun_trains_on_two_hosts(nodes: list[Host], recipe: Path, hostfile: Path, one_host: list[float]) -> None:
    command = ["launch/mpirun.sh", hostfile, recipe]
    with nodes[0].launch(*command, log=recipe.with_name("log"), GLOO_SOCKET_IFNAME="eth0") as run:
        assert run.wait() == 0, run.output()[-3000:]
    assert losses(recipe.with_name("run")) == one_host


def test_torchrun_trains_on_two_hosts(nodes: list[Host], recipe: Path, one_host: list[float]) -> None:
    there = ["--nnodes=2", "--nproc_per_node=1", f"--master_addr={nodes[0].address}", f"--master_port={free_port()}"]
    train = ["-m", "selfgen_ds", "train", "--config", recipe]
    launched = [
        host.launch(
            *("torchrun", *there, f"--node_rank={number}", *train),
            log=recipe.with_name(host.name),
            GLOO_SOCKET_IFNAME="eth0",
        )
        for number, host in enumerate(nodes)
    ]
    for run in launched:
        with run:
            assert run.wait() == 0, run.output()[-3000:]
    assert losses(recipe.with_name("run")) == one_host


def test_slurm_trains_on_two_hosts(slurm: Slurm, recipe: Path, one_host: list[float]) -> None:
    job = slurm.submit(recipe)
    assert slurm.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", slurm.log(job)
    assert "2 ranks on node[1-2]" in slurm.log(job)
    assert f"done; the model is in {recipe.with_name('run')}/model" in slurm.log(job)
    assert losses(recipe.with_name("run")) == one_host


def test_ranks_that_slurm_s_variables_do_not_reach_train_nothing(slurm: Slurm, recipe: Path) -> None:
    command = ["srun", "-N2", "-n2", sys.executable, "-m", "selfgen_ds", "train", "--config", recipe]
    with slurm.first.launch(*command, log=recipe.with_name("log")) as run:
        assert run.wait() == 2, run.output()[-3000:]
    assert "2 tasks were started" in run.output()
    assert not recipe.with_name("run").exists()


def test_deepspeed_trains_on_two_hosts_over_a_slow_network(
    nodes: list[Host], recipe: Path, hostfile: Path, one_host: list[float]
) -> None:
    with far_apart(nodes, "100mbit", 0.02):
        assert float(nodes[0].run("python3", "-c", ROUND_TRIP)) > 0.04
        started = time.monotonic()
        nodes[0].run("sh", "-c", "head -c 10000000 /dev/zero | ssh node2 'cat >/dev/null'")
        assert time.monotonic() - started > 0.8
        with nodes[0].launch("launch/deepspeed.sh", hostfile, recipe, log=recipe.with_name("log")) as run:
            assert run.wait() == 0, run.output()[-3000:]
    assert "2 ranks on 2 hosts" in run.output()
    assert losses(recipe.with_name("run")) == one_host
