"""Runs that lose a rank end soon, name the rank, and resume to the same bits, whatever the rank was doing."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from selfgen_ds.checkpoint import manifest
from tests import faults
from tests.points import Point
from tests.tiers import matrix

Unbroken = Callable[[str], faults.Whole]


WORK = {
    "a step": (
        "scheduled_sampling",
        1,
        Point(function="selfgen_ds.train:train_step", call=8, when="during", delay=0.03),
    ),
    "a drawn round": ("bash", 1, Point(function="selfgen_ds.rounds.store:Writer.write", call=5, when="after")),
    "a pass": ("scheduled_sampling", 0, Point(function="selfgen_ds.model.policy:EnginePolicy.draw", call=8)),
    "a rollout": ("rac", 0, Point(function="selfgen_ds.model.policy:EnginePolicy.complete", call=6)),
    "an evaluation": (
        "scheduled_sampling",
        1,
        Point(function="selfgen_ds.evaluation.scores:ask", call=4, when="during", delay=0.02),
    ),
}
STAGES = {
    "all but the marker": (0, Point(function="selfgen_ds.checkpoint.saving:write_marker", call=2)),
    "half a file of DeepSpeed's": (0, Point(function="torch:save", call=4, when="during")),
    "DeepSpeed's files alone": (0, Point(function="deepspeed:DeepSpeedEngine.save_checkpoint", call=2, when="after")),
    "a part of the sums": (1, Point(function="selfgen_ds.checkpoint.saving:sync_and_sum", call=5)),
    "the marker, other ranks not knowing": (
        0,
        Point(function="selfgen_ds.checkpoint.saving:write_marker", call=2, when="after"),
    ),
    "a marker removed": (0, Point(function="shutil:rmtree", inside="selfgen_ds.checkpoint.retention:remove")),
    "files half removed": (0, Point(function="os:unlink", call=5, inside="selfgen_ds.checkpoint.retention:remove")),
}


@matrix("where", WORK)
def test_a_run_resumes_after_a_rank_is_killed_in_a_function(unbroken: Unbroken, tmp_path: Path, where: str) -> None:
    method, rank, point = WORK[where]
    outcome = faults.break_and_resume(unbroken(method), tmp_path, rank, point)
    assert outcome.reached
    assert outcome.line


@matrix("stage", STAGES)
def test_a_run_resumes_after_a_rank_is_killed_at_a_stage_of_a_checkpoint(
    unbroken: Unbroken, tmp_path: Path, stage: str
) -> None:
    rank, point = STAGES[stage]
    outcome = faults.break_and_resume(unbroken("scheduled_sampling"), tmp_path, rank, point)
    assert outcome.reached
    assert outcome.line


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])  # `make soak` takes a hundred
def test_a_run_resumes_after_a_rank_is_killed_at_a_random_point(unbroken: Unbroken, tmp_path: Path, seed: int) -> None:
    choice = random.Random(seed)
    against = unbroken(choice.choice(list(faults.METHODS)))
    assert faults.break_and_resume(against, tmp_path, *faults.random_point(against, choice)).reached


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 1.5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_the_existing_checkpoints(unbroken: Unbroken, tmp_path: Path, tmpfs: Path) -> None:
    against = unbroken("scheduled_sampling")
    settings = replace(against.settings, output_dir=str(tmpfs / "run"))
    run = faults.start(settings, tmp_path / "full")
    assert run.wait() == [1, 1]
    line = r"selfgen-ds: error: rank \d on \S+ failed: \S+/step-\d+ could not be written, with 0\.\d MB free"
    for rank in range(2):
        assert re.search(line, run.output(rank)), run.output(rank)[-3000:]
    complete = manifest.complete_checkpoints(tmpfs / "run" / "checkpoints")
    assert complete
    assert not faults.broken_files(complete[-1])
    subprocess.run(["mount", "-o", "remount,size=50m", str(tmpfs)], check=True)
    again = faults.start(settings, tmp_path / "resumed")
    assert again.wait() == [0, 0], again.output(0)[-3000:]
    assert f"resumed from {complete[-1].path}" in again.output(0)
    faults.check_equal(settings, against)
