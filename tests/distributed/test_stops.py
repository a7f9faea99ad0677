"""Signals and stalls: one rank's signal stops all ranks with exit code 3, and a stall prints every rank's stacks."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfgen_ds.checkpoint import manifest
from selfgen_ds.config import Recipe, SelfgenConfig, TrainConfig, to_yaml
from selfgen_ds.ranks.watch import Watch
from tests import faults
from tests.distributed import runs
from tests.forked import Run
from tests.points import Point
from tests.ranks import Launched, Ranks, free_port
from tests.tiers import matrix

STOPPED = [3, 3]
Unbroken = Callable[[str], faults.Whole]


STOPS = {
    # the method, the rank that receives the signal, the function and its call, the signal, the step that is saved
    "a step": ("scheduled_sampling", 1, "selfgen_ds.train:train_step", 7, signal.SIGUSR1, 7),
    "a step that is saved anyway": ("scheduled_sampling", 0, "selfgen_ds.train:train_step", 6, signal.SIGTERM, 6),
    "an evaluation": ("scheduled_sampling", 1, "selfgen_ds.evaluation.scores:ask", 3, signal.SIGUSR1, 8),
    "a drawn round": ("bash", 0, "selfgen_ds.rounds.store:Writer.write", 7, signal.SIGTERM, 5),
    "the first round": ("bash", 1, "selfgen_ds.rounds.store:Writer.write", 2, signal.SIGUSR1, 0),
    "a checkpoint": ("scheduled_sampling", 1, "deepspeed:DeepSpeedEngine.save_checkpoint", 3, signal.SIGTERM, 6),
}


ONE = pytest.param("a step", marks=pytest.mark.check)  # a stop, and a resume to the same bits
OTHERS = [where for where in STOPS if where != "a step"]


@matrix("where", [ONE, *OTHERS])
def test_a_signal_to_one_rank_stops_all_ranks(unbroken: Unbroken, tmp_path: Path, where: str) -> None:
    method, rank, function, call, number, step = STOPS[where]
    against = unbroken(method)
    settings = replace(against.settings, output_dir=str(tmp_path / "run"))
    point = Point(function=function, call=call, signal=number)
    run = faults.start(settings, tmp_path / "stopped", {rank: point})
    assert run.wait() == STOPPED, run.output(0)[-3000:]
    assert "Traceback" not in run.output(0) + run.output(1)
    assert not (tmp_path / "run" / "model").exists()
    complete = manifest.complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert (complete[-1].step if complete else 0) == step
    settings.checkpoint = replace(settings.checkpoint, keep=9)
    again = faults.start(settings, tmp_path / "resumed")
    assert again.wait() == [0, 0], again.output(0)[-3000:]
    faults.check_equal(settings, against)
    found = manifest.complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert not any(c.unevaluated for c in found)
    assert {c.step for c in found if c.metrics} >= {8, 12} if where == "an evaluation" else {12}


@pytest.mark.slow
def test_a_second_signal_changes_nothing(unbroken: Unbroken, tmp_path: Path) -> None:
    against = unbroken("scheduled_sampling")
    settings = replace(against.settings, output_dir=str(tmp_path / "run"))
    first = Point(function="selfgen_ds.train:train_step", call=8, signal=signal.SIGTERM)
    second = Point(function="selfgen_ds.checkpoint.saving:sync_and_sum", call=11, signal=signal.SIGTERM)
    run = faults.start(settings, tmp_path / "stopped", {0: first, 1: second})
    assert run.wait() == STOPPED, run.output(0)[-3000:]
    assert manifest.complete_checkpoints(tmp_path / "run" / "checkpoints")[-1].step == 8
    assert faults.start(settings, tmp_path / "resumed").wait() == [0, 0]
    faults.check_equal(settings, against)


def test_a_signal_while_python_imports_stops_a_rank_too(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(to_yaml(faults.recipe(folder, "bash")))
    command = [sys.executable, "-m", "selfgen_ds", "train", "--config", str(folder / "recipe.yaml")]
    with Launched(command, folder / "log") as run:
        while "libtorch" not in Path(f"/proc/{run.process.pid}/maps").read_text():
            assert run.process.poll() is None
            time.sleep(0.01)
        run.process.send_signal(signal.SIGUSR1)
        assert run.wait() == STOPPED[0]
    assert run.output() == "selfgen-ds: stopped by a signal before the first step\n"


STARTS = [f"selfgen_ds.{function}" for function in ("setup.prepare:load_tokenizer", "setup.build:build_model")]


@matrix("function", [*STARTS, "selfgen_ds.train:BetweenSteps"])  # the last is reached a moment before the first step
def test_before_the_first_step_there_is_nothing_to_save(folder: Path, function: str) -> None:
    settings = faults.recipe(folder, "scheduled_sampling")
    run = faults.start(settings, folder, {1: Point(function=function, signal=signal.SIGUSR1)})
    assert run.wait() == STOPPED, run.output(0)[-3000:]
    for rank in range(2):
        assert "selfgen-ds: stopped by a signal before the first step" in run.output(rank)
        assert "error:" not in run.output(rank)


@pytest.mark.slow
def test_after_the_last_step_a_run_ends_as_it_would(unbroken: Unbroken, tmp_path: Path) -> None:
    settings = replace(unbroken("scheduled_sampling").settings, output_dir=str(tmp_path / "run"))
    point = Point(function="selfgen_ds.train:export_engine", signal=signal.SIGTERM)
    run = faults.start(settings, tmp_path, {0: point, 1: point})
    assert run.wait() == [0, 0], run.output(0)[-3000:]
    faults.check_equal(settings, unbroken("scheduled_sampling"))


def train_slowly(settings: Recipe) -> None:
    """Train with forwards that take half a second more each."""
    begin = Watch.begin

    def slowed(watch: Watch, module: torch.nn.Module, folder: Path) -> None:
        begin(watch, module, folder)
        module.register_forward_pre_hook(lambda *_: time.sleep(0.5))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "begin", slowed)
        runs.run_training(settings)


@pytest.mark.slow
def test_a_chunk_of_a_round_that_takes_long_is_no_stall(two_ranks: Ranks, tmp_path: Path) -> None:
    runs.write_rows(tmp_path, 8)  # one chunk on one rank, for which the other rank waits
    rac = SelfgenConfig(method="rac", max_new_tokens=24)
    settings = runs.recipe(tmp_path, selfgen=rac, train=TrainConfig(max_steps=1, micro_batch_size=1, stall_seconds=3.0))
    two_ranks.run(train_slowly, settings)
    assert runs.metrics(settings)[0]["round_time_s"] > 4 * settings.train.stall_seconds


LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_accelerators=2", "--module", "selfgen_ds"],
    "torchrun": ["torchrun", "--nproc_per_node=2", "-m", "selfgen_ds"],
}


@contextmanager
def endless_run(tmp_path: Path, launcher: str) -> Iterator[tuple[Path, Launched]]:
    """Start a run that does not end by itself, and wait for its first step. Yield its folder and the launcher."""
    runs.write_rows(tmp_path)
    settings = runs.recipe(tmp_path)
    settings.train.max_steps = 100_000
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(settings))
    binary, *options = LAUNCHERS[launcher]
    command = [str(Path(sys.executable).with_name(binary)), f"--master_port={free_port()}", *options]
    output = Path(settings.output_dir)
    with Launched([*command, "train", "--config", str(recipe)], tmp_path / "log") as run:
        while not runs.count_lines(output / "metrics.jsonl"):
            assert run.process.poll() is None, run.output()[-3000:]
            time.sleep(0.05)
        yield output, run


def wait_until_ended(output: Path) -> None:
    """Wait until no process of the run is left: a launcher may end before the ranks that it started."""
    deadline = time.monotonic() + 60.0
    while subprocess.run(["pgrep", "-f", str(output.parent / "recipe.yaml")], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@matrix("launcher", LAUNCHERS)
def test_the_documented_command_stops_a_run_of_one_host(tmp_path: Path, launcher: str) -> None:
    with endless_run(tmp_path, launcher) as (output, run):
        subprocess.run(["pkill", "-USR1", "-f", "--", f"-u -m selfgen_ds .*{tmp_path / 'recipe.yaml'}"], check=True)
        assert run.wait() == {"deepspeed": 3, "torchrun": 1}[launcher], run.output()[-3000:]
    assert "received SIGUSR1: saving, then stopping" in run.output()
    steps = runs.count_lines(output / "metrics.jsonl")
    assert [c.step for c in manifest.complete_checkpoints(output / "checkpoints")] == [steps]


@matrix("launcher", LAUNCHERS)
def test_ctrl_c_saves_the_run_too(tmp_path: Path, launcher: str) -> None:
    with endless_run(tmp_path, launcher) as (output, run):
        os.killpg(run.process.pid, signal.SIGINT)  # a terminal sends it to the launcher and to every rank
        run.wait()
        wait_until_ended(output)
    steps = runs.count_lines(output / "metrics.jsonl")
    assert [c.step for c in manifest.complete_checkpoints(output / "checkpoints")] == [steps], run.output()[-3000:]


def test_a_second_ctrl_c_ends_a_rank_at_once(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(runs.YAML.format(folder=folder))
    arguments = ["train", "--config", str(folder / "recipe.yaml"), "--train.max_steps", "100000"]
    run = Run(
        arguments, folder, ranks=1, broken={0: Point(function="selfgen_ds.train:train_step", call=3, signal=None)}
    )
    run.until(lambda: runs.count_lines(folder / "run" / "metrics.jsonl") == 2)
    for _ in range(2):  # the third step never ends, and never asks for signals
        os.kill(run.processes[0].pid or 0, signal.SIGINT)
        time.sleep(0.2)
    assert run.wait() == [130]
    assert "interrupted twice; the last steps are not saved" in run.output(0)


HANGS = {
    "train.start_stall_seconds": ("selfgen_ds.setup.prepare:load_tokenizer", "tests/points.py"),
    "train.stall_seconds": ("selfgen_ds.data.batches:StepBatches.at", "concurrent/futures/_base.py"),
    "checkpoint.stall_seconds": ("deepspeed:DeepSpeedEngine.save_checkpoint", "tests/points.py"),
}
"""Setting of a phase -> a function in which rank 1 hangs, and where its main thread is then."""


@pytest.mark.slow
@pytest.mark.parametrize("setting", HANGS)
def test_a_rank_that_hangs_is_named_with_every_rank_s_stack(folder: Path, setting: str) -> None:
    settings, (function, waits_in) = faults.recipe(folder, "scheduled_sampling"), HANGS[setting]
    section, name = setting.split(".")
    setattr(getattr(settings, section), name, 9.0)
    run = faults.start(settings, folder, {1: Point(function=function, call=1, signal=None)})
    assert run.wait() == [1, 1]
    stall = rf"no rank has made a forward for {{}} s \({setting}\); the others wait for rank 1 on \S+; "
    for rank, inner in enumerate(["torch/distributed/", waits_in]):
        printed = run.output(rank)
        told = rf"rank {rank} on \S+: {stall.format('1[01]')}the stacks of this rank:"
        assert re.search(told, printed), printed[-3000:]
        main_thread = printed.partition("the stacks of this rank:")[2].rpartition("Thread 0x")[2]
        assert inner in main_thread, printed[-3000:]
        assert "selfgen_ds/train.py" in main_thread
        assert re.search(rf"error: {stall.format('(19|2[01])')}rank {rank} on \S+ ends", printed), printed[-3000:]
    if setting == "train.start_stall_seconds":
        return
    records = sorted((Path(settings.output_dir) / "flight-record").iterdir())
    assert [path.name for path in records] == ["rank_0", "rank_1"]
    entered, behind = ([entry["profiling_name"] for entry in pickle.loads(p.read_bytes())["entries"]] for p in records)
    assert len(entered) > len(behind) > 0, "rank 0 waits in a collective that rank 1 has not entered"
