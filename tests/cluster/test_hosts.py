"""Hosts that are lost, hosts that share no folder, and the plain `deepspeed --hostfile` command."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from selfgen_ds.config import CheckpointConfig, Recipe, TrainConfig, to_yaml
from tests.cluster.hosts import PATH, Host
from tests.cluster.watching import losses, nothing_is_left, wait_until
from tests.distributed import runs
from tests.ranks import deepspeed

NOTICED_WITHIN = 60.0  # seconds
STEPS = 20  # so many that a host can be lost after the first checkpoint, of step 4, and before the last step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Run a recipe on one host, unbroken."""
    folder = tmp_path_factory.mktemp("whole")
    runs.write_rows(folder)
    settings = runs.recipe(
        folder,
        train=TrainConfig(max_steps=STEPS, micro_batch_size=2, gradient_accumulation_steps=2),
        checkpoint=CheckpointConfig(every=4),
        resume="auto",
    )
    with deepspeed(["train", "--config", write(settings, folder)], folder / "log") as run:
        assert run.wait() == 0, run.output()[-3000:]
    return settings


def write(settings: Recipe, folder: Path) -> str:
    (folder / "recipe.yaml").write_text(to_yaml(settings))
    return str(folder / "recipe.yaml")


def test_a_run_that_loses_a_host_ends_soon_and_continues_as_if_it_had_not(
    nodes: list[Host], whole: Recipe, hostfile: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    recipe = write(replace(whole, output_dir=str(output)), tmp_path)
    with nodes[0].launch("launch/deepspeed.sh", hostfile, recipe, log=tmp_path / "log") as run:
        wait_until(lambda: len(losses(output)) >= 5, run)
        nodes[1].link("down")  # no FIN, no RST
        lost = time.monotonic()
        for host in nodes:
            wait_until(lambda host=host: not host.ranks(), timeout=NOTICED_WITHIN)  # type: ignore[misc]
        assert time.monotonic() - lost < NOTICED_WITHIN
        assert run.wait() == 1, run.output()[-3000:]
    assert re.search(r"rank 1 on node2 is gone: .*; rank 0 on node1 ends", run.output()), run.output()[-3000:]
    assert "deepspeed.sh: host node2: the connection is lost" in run.output()
    assert nothing_is_left(nodes[:1])
    nodes[1].link("up")
    with nodes[0].launch("launch/deepspeed.sh", hostfile, recipe, log=tmp_path / "log") as run:
        assert run.wait() == 0, run.output()[-3000:]
    assert "resumed from" in run.output()
    assert losses(output) == losses(Path(whole.output_dir))
    models = [folder / "model" / "model.safetensors" for folder in (output, Path(whole.output_dir))]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_hosts_that_share_no_folder_keep_a_part_of_each_checkpoint(
    nodes: list[Host], whole: Recipe, hostfile: Path, tmp_path: Path
) -> None:
    output = nodes[0].local / "run"  # each host has its own disk at this path
    recipe = write(replace(whole, output_dir=str(output)), tmp_path)
    parts = []
    for steps in (4, 6):
        command = ["launch/deepspeed.sh", hostfile, recipe, "--train.max_steps", steps, "--optim.schedule", "constant"]
        with nodes[0].launch(*command, log=tmp_path / "log") as run:
            assert run.wait() == 0, run.output()[-3000:]
        if steps == 4:
            parts = [set(host.run("ls", output / "checkpoints" / "step-000004").split()) for host in nodes]
    assert f"resumed from {output}/checkpoints/step-000004" in run.output()
    states = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    assert [[name in part for name in states] for part in parts] == [[True, False], [False, True]]
    assert all("complete.json" in part for part in parts)


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="not installed: pdsh (make cluster-packages)")
def test_the_deepspeed_command_over_pdsh_gives_the_same_run(
    nodes: list[Host], whole: Recipe, hostfile: Path, tmp_path: Path
) -> None:
    recipe = write(replace(whole, output_dir=str(tmp_path / "run")), tmp_path)
    variables = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": PATH}
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    command = ["deepspeed", "--hostfile", hostfile, "--master_addr", nodes[0].address, "--module", "selfgen_ds"]
    train = ["train", "--config", recipe]
    with nodes[0].launch(*command, *train, log=tmp_path / "log", DS_ENV_FILE=str(tmp_path / "env")) as run:
        assert run.wait() == 0, run.output()[-3000:]
    assert losses(tmp_path / "run") == losses(Path(whole.output_dir))
