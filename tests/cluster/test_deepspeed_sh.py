"""launch/deepspeed.sh: its checks, the arguments and variables of the ranks, and the ends of runs."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import time
from contextlib import ExitStack
from importlib.metadata import distribution
from pathlib import Path

import pytest

import selfgen_ds
from selfgen_ds.versions import versions
from tests.cluster.hosts import Host
from tests.cluster.watching import HOSTILE, environment, losses, nothing_is_left, wait_until
from tests.ranks import ROOT, Launched


def refused(run: Launched) -> list[str]:
    """Return the error lines of a refused run, which prints nothing else."""
    with run:
        assert run.wait() == 2, run.output()[-3000:]
    lines = run.output().splitlines()
    assert all(line.startswith("deepspeed.sh: error: ") for line in lines), run.output()[-3000:]
    return [line.removeprefix("deepspeed.sh: error: ") for line in lines]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected at least one line NAME slots=NUMBER"),
        ("node1 slots=1\nnode2\n", "line 2: expected NAME slots=NUMBER, got node2"),
        ("node1 slots=0\n", "line 1: expected NAME slots=NUMBER"),
        ("# hosts\n\nnode1 slots=1\nnode1 slots=1\n", "line 4: host node1 is there twice"),
        ("$(touch${IFS}made) slots=1\n", "line 1: expected NAME slots=NUMBER"),
        ("-oProxyCommand=touch slots=1\n", "line 1: expected NAME slots=NUMBER"),
    ],
    ids=["empty", "no slots", "no rank", "twice", "a command", "an option"],
)
def test_a_bad_hostfile_is_one_clear_line(nodes: list[Host], recipe: Path, text: str, expected: str) -> None:
    (recipe.parent / "hostfile").write_text(text)
    run = nodes[0].launch("launch/deepspeed.sh", recipe.parent / "hostfile", recipe, log=recipe.with_name("log"))
    (line,) = refused(run)
    assert expected in line
    assert line.startswith(str(recipe.parent / "hostfile"))
    assert not (ROOT / "made").exists()


def test_a_bad_recipe_is_met_before_any_host_is_asked(nodes: list[Host], recipe: Path, hostfile: Path) -> None:
    nodes[1].link("down")
    for arguments, expected in {
        (recipe, "--train.max_step", "3"): "--train.max_step: no such setting",
        (recipe.with_name("none.yaml"),): "none.yaml",
        (recipe, "--deepspeed", "none.json"): "none.json",
    }.items():
        (line,) = refused(nodes[0].launch("launch/deepspeed.sh", hostfile, *arguments, log=recipe.with_name("log")))
        assert expected in line


def test_everything_that_differs_is_a_line_with_its_host(nodes: list[Host], recipe: Path, hostfile: Path) -> None:
    (recipe.parent / "hostfile").write_text("node1 slots=1\nnode2 slots=1\nnode3 slots=1\n")  # there is no node3
    installed = Path(str(distribution("torch").locate_file("")))
    torch = next(installed.glob("torch-*.dist-info/METADATA"))
    ds_config = ROOT / "ds_configs" / "zero3_cpu.json"
    with ExitStack() as stack:
        version = f"\nVersion: {versions()['torch']}\n"
        stack.enter_context(nodes[1].replaced(torch, torch.read_text().replace(version, "\nVersion: 1.0\n")))
        for file in (Path(str(selfgen_ds.__file__)), recipe, ds_config):
            stack.enter_context(nodes[1].replaced(file, file.read_text() + "\n"))
        command = ["launch/deepspeed.sh", hostfile, recipe]
        found = refused(nodes[0].launch(*command, log=recipe.with_name("log")))
    assert [line.split(" is ")[0] for line in found[:-1]] == [
        "host node2: torch",
        "host node2: selfgen_ds source",
        f"host node2: recipe {recipe}",
        f"host node2: DeepSpeed JSON {ds_config}",
    ]
    assert f"torch is 1.0, here {versions()['torch']}" in found[0]
    assert found[-1].startswith("host node3: ssh: ")


def test_a_host_without_the_folder_is_named(nodes: list[Host], recipe: Path, hostfile: Path) -> None:
    here = nodes[0].local / "here"
    nodes[0].run("mkdir", here)
    command = ["env", f"--chdir={here}", ROOT / "launch" / "deepspeed.sh", hostfile, recipe]
    (line,) = refused(nodes[0].launch(*command, log=recipe.with_name("log")))
    assert line == f"host node2: there is no folder {here}"


def test_a_missing_interface_is_one_clear_line(nodes: list[Host], recipe: Path, hostfile: Path) -> None:
    command = ["launch/deepspeed.sh", hostfile, recipe]
    (line,) = refused(nodes[0].launch(*command, log=recipe.with_name("log"), GLOO_SOCKET_IFNAME="ib0"))
    assert line == "host node1: GLOO_SOCKET_IFNAME: there is no interface ib0 with an address"


def test_a_dry_run_shows_what_would_run_and_starts_nothing(nodes: list[Host], recipe: Path, hostfile: Path) -> None:
    shown = nodes[0].run("launch/deepspeed.sh", "--dry-run", hostfile, recipe, "--seed", "7", HF_TOKEN="secret")
    assert "HF_TOKEN" in shown
    assert "secret" not in shown
    for number, host in enumerate(nodes):
        (line,) = (line for line in shown.splitlines() if line.startswith(f"{host.name}, over eth0: "))
        assert (
            f"--node_rank={number} --master_addr='{nodes[0].address}'" in line
        )  # not 127.0.1.1, to which node1 resolves its own name
        assert line.endswith(f"'--config' '{recipe}' '--resume' 'auto' '--seed' '7'")
    assert not recipe.with_name("run").exists()


def test_arguments_and_variables_arrive_byte_for_byte(nodes: list[Host], recipe: Path, hostfile: Path) -> None:
    out = str(recipe.parent / HOSTILE)
    (nodes[0].home / ".deepspeed_env").write_text('# ours\n\nNCCL_DEBUG=$HF_X\nNCCL_A=b"c d\n')
    command = ["launch/deepspeed.sh", hostfile, recipe, "--output_dir", out, "--model.tokenizer", ""]
    variables = {"HF_X": HOSTILE, "HF_TOKEN": "a secret", "EDITOR": "vi"}
    with nodes[0].launch(*command, log=recipe.with_name("log"), **variables) as run:
        wait_until(lambda: all(host.ranks() for host in nodes), run)
        for number, host in enumerate(nodes):
            (rank,) = host.ranks()
            arguments = Path(f"/proc/{rank}/cmdline").read_bytes().decode().split("\0")
            assert arguments[-5:] == ["--output_dir", out, "--model.tokenizer", "", ""]
            there = environment(rank)
            assert there["RANK"] == str(number)
            assert there["HF_X"] == there["NCCL_DEBUG"] == HOSTILE
            assert there["NCCL_A"] == 'b"c d'
            assert there["HF_TOKEN"] == "a secret"
            assert "EDITOR" not in there
            assert not any("a secret" in word for words in host.processes().values() for word in words)
    (nodes[0].home / ".deepspeed_env").unlink()
    assert "a secret" not in run.output()
    assert not (ROOT / "made").exists()


def test_ranks_are_where_the_hostfile_says(nodes: list[Host], recipe: Path, hostfile: Path) -> None:
    hostfile.write_text("node2 slots=2\n# rank 2\nnode1 slots=1 # not more\n")
    shown = nodes[0].run("launch/deepspeed.sh", "--dry-run", hostfile, recipe)
    assert f"--master_addr='{nodes[1].address}'" in shown
    worlds = set(re.findall("--world_info=(\\S+)", shown))
    assert [json.loads(base64.urlsafe_b64decode(world)) for world in worlds] == [{"node2": [0, 1], "node1": [0]}]


def test_a_single_host_talks_to_itself(nodes: list[Host], recipe: Path, hostfile: Path) -> None:
    hostfile.write_text("node1 slots=2\n")
    shown = nodes[0].run("launch/deepspeed.sh", "--dry-run", hostfile, recipe)
    assert "node1, over lo: " in shown
    assert "--master_addr='127.0.0.1'" in shown


def test_each_host_uses_its_own_interface(nodes: list[Host], recipe: Path, hostfile: Path) -> None:
    rename = "ip link set {0} down; ip link set {0} name {1}; ip link set {1} up"
    nodes[1].run("sh", "-ec", rename.format("eth0", "lan0"))
    try:
        with nodes[0].launch("launch/deepspeed.sh", hostfile, recipe, log=recipe.with_name("log")) as run:
            wait_until(lambda: all(host.ranks() for host in nodes), run)
            found = [environment(host.ranks()[0])["GLOO_SOCKET_IFNAME"] for host in nodes]
    finally:
        nodes[1].run("sh", "-ec", rename.format("lan0", "eth0"))
    assert found == ["eth0", "lan0"]


def start(nodes: list[Host], recipe: Path, hostfile: Path, steps: int) -> Launched:
    """Start a run that does not end by itself, and wait until it has done `steps`."""
    command = ["launch/deepspeed.sh", hostfile, recipe, "--train.max_steps", "100000", "--checkpoint.every", "100000"]
    run = nodes[0].launch(*command, log=recipe.with_name("log"))
    wait_until(lambda: len(losses(recipe.with_name("run"))) >= steps, run)
    return run


def test_a_signal_stops_the_ranks_the_same_command_continues_and_no_other_run_gets_the_port(
    nodes: list[Host], recipe: Path, hostfile: Path
) -> None:
    run_folder = recipe.with_name("run")
    with start(nodes, recipe, hostfile, 2) as run:
        nodes[0].signal(run, signal.SIGUSR1)
        assert run.wait() == 3, run.output()[-3000:]
    steps = len(losses(run_folder))
    assert (run_folder / "checkpoints" / f"step-{steps:06d}" / "complete.json").exists()
    assert nothing_is_left(nodes)
    with start(nodes, recipe, hostfile, steps + 1) as run:
        assert f"resumed from {run_folder}/checkpoints/step-{steps:06d}" in run.output()
        command = ["launch/deepspeed.sh", hostfile, recipe, "--output_dir", recipe.with_name("other")]
        with nodes[0].launch(*command, log=recipe.with_name("other-log")) as other:
            assert other.wait() == 2, other.output()[-3000:]
        assert "MASTER_PORT: 29500 is taken on 10.77.0.1" in other.output()
        steps = len(losses(run_folder))
        wait_until(lambda: len(losses(run_folder)) > steps + 5, run)
        nodes[0].signal(run, signal.SIGTERM)
        assert run.wait() == 3, run.output()[-3000:]


def test_a_second_interrupt_ends_everything_at_once(nodes: list[Host], recipe: Path, hostfile: Path) -> None:
    with start(nodes, recipe, hostfile, 2) as run:
        for host in nodes:  # a rank that cannot end
            os.kill(host.ranks()[0], signal.SIGSTOP)
        nodes[0].signal(run, signal.SIGINT)
        time.sleep(2)
        assert run.process.poll() is None
        nodes[0].signal(run, signal.SIGINT)
        assert run.wait() == 1, run.output()[-3000:]
    assert nothing_is_left(nodes)


def test_a_rank_that_dies_ends_the_run_on_all_hosts(nodes: list[Host], recipe: Path, hostfile: Path) -> None:
    with start(nodes, recipe, hostfile, 2) as run:
        os.kill(nodes[0].ranks()[0], signal.SIGSTOP)  # even where ranks cannot end by themselves
        os.kill(nodes[1].ranks()[0], signal.SIGKILL)
        killed = time.monotonic()
        assert run.wait() == 1, run.output()[-3000:]
    assert 35 < time.monotonic() - killed < 90, "others may need 30 s to miss the rank and to name it"
    assert "deepspeed.sh: host node2 ended, killed by signal 9: the run ends on all hosts" in run.output()
    assert nothing_is_left(nodes)
