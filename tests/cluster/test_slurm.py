"""launch/slurm.sbatch: jobs that go back into the queue, and jobs that do not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.hosts import Host
from tests.cluster.slurm import Slurm
from tests.cluster.watching import HOSTILE, losses
from tests.ranks import ROOT

ENDLESS = ("--train.max_steps", "100000", "--checkpoint.every", "100000")


def test_a_job_that_is_told_to_stop_is_requeued_and_continues(slurm: Slurm, recipe: Path) -> None:
    run = recipe.with_name("run")
    job = slurm.submit(recipe, *ENDLESS)
    slurm.until(job, lambda: len(losses(run)) >= 2)
    port = f"10.77.0.1:{10000 + int(job)}"
    assert port in slurm.first.run("ss", "--numeric", "--tcp", "--listening"), "of the cluster's interface alone"
    slurm.first.run("scancel", "--batch", "--signal=USR1", job)
    slurm.until(job, lambda: "requeued" in slurm.log(job))
    steps = len(losses(run))
    assert (run / "checkpoints" / f"step-{steps:06d}" / "complete.json").exists()
    slurm.start_again(job)
    slurm.until(job, lambda: len(losses(run)) > steps)
    assert f"step-{steps:06d}" in slurm.log(job, 0)
    assert "start 1 of" in slurm.log(job)
    assert "start 2 of" in slurm.log(job)


def test_a_job_is_stopped_and_requeued_before_its_time_limit(slurm: Slurm, recipe: Path) -> None:
    run = recipe.with_name("run")
    # Slurm signals five minutes before the limit, as the script asks, and up to one minute earlier
    job = slurm.submit(recipe, *ENDLESS, options=("--time=6",))
    slurm.until(job, lambda: "requeued" in slurm.log(job))
    assert "a signal: the ranks save and stop" in slurm.log(job)
    if steps := len(losses(run)):  # the signal may come before the first step
        assert (run / "checkpoints" / f"step-{steps:06d}" / "complete.json").exists()
    slurm.until(job, lambda: slurm.job(job)["JobState"] == "PENDING")
    assert slurm.job(job)["Restarts"] == "1"


def test_a_job_that_is_preempted_saves_and_continues_later(slurm: Slurm, recipe: Path) -> None:
    run = recipe.with_name("run")
    job = slurm.submit(recipe, *ENDLESS, options=("--partition=low",))
    slurm.until(job, lambda: len(losses(run)) >= 2)
    short = ("--output=/dev/null", "--wrap=sleep 1")
    other = slurm.first.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", *short)
    slurm.until(job, lambda: "stopped after saving" in slurm.log(job))
    steps = len(losses(run))
    assert (run / "checkpoints" / f"step-{steps:06d}" / "complete.json").exists()
    slurm.until(job, lambda: slurm.job(other.strip())["JobState"] == "COMPLETED")
    slurm.start_again(job)
    slurm.until(job, lambda: len(losses(run)) > steps)


def test_a_job_that_is_cancelled_saves_and_stays_out_of_the_queue(slurm: Slurm, recipe: Path) -> None:
    out = recipe.parent / HOSTILE.replace("*", "")  # output_dir may not contain a star
    job = slurm.submit(recipe, *ENDLESS, "--output_dir", str(out))
    slurm.until(job, lambda: len(losses(out)) >= 2)
    slurm.first.run("scancel", job)
    found = slurm.wait(job, "CANCELLED")
    slurm.until(job, lambda: "stopped after saving" in slurm.log(job))
    assert found["Restarts"] == "0"
    assert "requeued" not in slurm.log(job)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["--data.train", "none.jsonl"], "data.train: expected an existing file"),  # srun stops the other rank early
        (["--train.max_step", "4"], "--train.max_step: no such setting; did you mean --train.max_steps?"),
    ],
    ids=["file", "name"],
)
def test_a_job_that_fails_is_not_requeued(slurm: Slurm, recipe: Path, overrides: list[str], problem: str) -> None:
    job = slurm.submit(recipe, *overrides)
    found = slurm.wait(job, "FAILED", "COMPLETED")
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0")
    assert problem in slurm.log(job)


def test_a_rank_that_is_killed_ends_the_job(slurm: Slurm, nodes: list[Host], recipe: Path) -> None:
    job = slurm.submit(recipe, *ENDLESS)
    slurm.until(job, lambda: len(losses(recipe.with_name("run"))) >= 2)
    os.kill(nodes[0].ranks()[0], signal.SIGSTOP)  # even where ranks cannot end by themselves
    os.kill(nodes[1].ranks()[0], signal.SIGKILL)
    found = slurm.wait(job, "FAILED", "COMPLETED")
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0")
    assert "task 1: Killed" in slurm.log(job)


def test_a_dry_run_shows_what_would_run(nodes: list[Host], recipe: Path) -> None:
    shown = nodes[0].run("launch/slurm.sbatch", "--dry-run", recipe, "--output_dir", "a b")
    assert shown.startswith("srun --kill-on-bad-exit=1 ")
    assert shown.rstrip().endswith(f"{recipe} --resume auto --output_dir a\\ b")


def test_a_task_with_a_gpu_and_too_few_processors_is_one_clear_line(nodes: list[Host], recipe: Path) -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_GPUS": "0,1", "SLURM_CPUS_PER_TASK": "2"}
    with nodes[0].launch("launch/slurm.sbatch", recipe, log=recipe.with_name("log"), **job) as run:
        assert run.wait() == 2
    assert run.output().endswith("--cpus-per-task: a task with a GPU needs 4 processors or more, got 2\n")


def test_a_missing_recipe_is_one_clear_line(nodes: list[Host], recipe: Path) -> None:
    with nodes[0].launch("launch/slurm.sbatch", "none.yaml", log=recipe.with_name("log")) as run:
        assert run.wait() == 2
    assert run.output() == f"slurm.sbatch: error: none.yaml: there is no such recipe in {ROOT}\n"
