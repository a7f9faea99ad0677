"""Pilots whose runs are shared by hosts: `launch/deepspeed.sh --pilot` over ssh, and a Slurm array."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.cluster.hosts import Host
from tests.cluster.slurm import Slurm
from tests.cluster.watching import nothing_is_left, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SMALL = ("--rows", "16", "--held_out", "10", "--seeds", "1", "--evaluation", "{}", "--train.epochs", "1")


@pytest.fixture
def pilot(recipe: Path) -> Path:
    """Return the recipe with rows enough for a pilot, and with a step of two rows on one rank."""
    rows = [{"prompt": f"q{i:02d}=", "completion": f"{i:02d}"[::-1]} for i in range(30)]
    (recipe.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe


def _done(recipe: Path) -> set[str]:
    return {path.parent.name for path in recipe.with_name("run").glob("runs/*/evaluation.json")}


def test_hosts_share_a_pilot_and_a_signal_stops_all_of_them(nodes: list[Host], pilot: Path, hostfile: Path) -> None:
    command = ["launch/deepspeed.sh", "--pilot", hostfile, pilot, *SMALL]
    folder = pilot.with_name("run")
    with nodes[0].launch(*command, log=pilot.with_name("log")) as run:
        wait_until(lambda: len(list(folder.glob("runs/*/metrics.jsonl"))) >= 2, run)
        assert all(host.ranks() for host in nodes), "a run on each host"
        nodes[0].signal(run, signal.SIGTERM)
        assert run.wait() == 3, run.output()[-3000:]
    assert not (folder / "pilot.json").exists()
    wait_until(lambda: nothing_is_left(nodes))
    with nodes[0].launch(*command, log=pilot.with_name("log")) as run:
        assert run.wait() == 0, run.output()[-3000:]
    assert _done(pilot) == {"sft-3", "scheduled_sampling-3"}
    assert json.loads((folder / "pilot.json").read_text())["seeds"] == [3]


def test_the_tasks_of_a_slurm_array_share_a_pilot(slurm: Slurm, pilot: Path) -> None:
    where = ("--array=0-1", "--gres=none", f"--chdir={pilot.parent}", "--output=%x-%A_%a.log")
    job = slurm.first.run("sbatch", "--parsable", *where, "launch/pilot.sbatch", pilot, *SMALL).strip()
    slurm.watch(job, pilot.parent)
    slurm.until(job, lambda: (pilot.with_name("run") / "pilot.json").exists(), timeout=400)
    assert len(_done(pilot)) == 2
    logs = [pilot.with_name(f"selfgen-ds-pilot-{job}_{task}.log") for task in (0, 1)]
    slurm.until(job, lambda: all("ended with exit code 0" in log.read_text() for log in logs))
