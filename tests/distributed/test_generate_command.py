"""`selfgen.generate_command` on real ranks: another process answers a round's prompts, fails, hangs, and is killed."""

from __future__ import annotations

import re
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from selfgen_ds.config import LoraConfig, ModelConfig, Recipe, SelfgenConfig, to_yaml
from selfgen_ds.ranks import process_group
from tests.distributed import runs
from tests.distributed.round_runs import TIMEOUT, audit, drawn, rounds
from tests.forked import Run
from tests.ranks import Ranks
from tests.tiers import matrix

GREEDY = {
    "rac": SelfgenConfig(method="rac", top_k=1, max_new_tokens=6, answers_per_prompt=2),
    "own_samples": SelfgenConfig(method="own_samples", top_k=1, max_new_tokens=6),
}


def answering(*mode: str) -> str:
    """Return the command of `tests/answering.py`."""
    places = "{model} {prompts} {answers}"
    return f"{shlex.quote(sys.executable)} -m tests.answering {places} {shlex.join(mode)}"


def by_command(settings: Recipe, folder: Path, *mode: str) -> Recipe:
    """Return the recipe with a command that answers, in a folder of its own."""
    selfgen = replace(settings.selfgen, generate_command=answering(*mode))
    return replace(settings, selfgen=selfgen, output_dir=str(folder / "by-command"), resume="auto")


def greedy(folder: Path, method: str = "rac") -> Recipe:
    """Return the recipe of a run that draws two rounds greedily, of a model whose answers differ."""
    model = ModelConfig(name_or_path=runs.write_model(folder, initializer_range=0.5), dtype="float32")
    settings = runs.recipe(folder, model=model, selfgen=GREEDY[method])
    settings.train.max_steps = 7
    return settings


@matrix("method", GREEDY)
def test_a_command_that_answers_greedily_gives_the_rounds_and_the_run_of_the_model_itself(
    two_ranks: Ranks, folder: Path, method: str
) -> None:
    own = greedy(folder, method)
    two_ranks.run(runs.run_training, own, timeout=TIMEOUT)
    other = by_command(own, folder)
    two_ranks.run(runs.run_training, other, timeout=TIMEOUT)
    assert rounds(other) == rounds(own) == ["round-01", "round-02"]
    for name in rounds(own):
        assert drawn(other, name) == drawn(own, name)
        assert audit(other, name)["counts"] == audit(own, name)["counts"]
        assert (audit(own, name)["by_command"], audit(other, name)["by_command"]) == (False, True)
        assert not (Path(other.output_dir) / "rollouts" / name / "command").exists()
    assert runs.untimed(other) == runs.untimed(own)
    assert runs.weights(other) == runs.weights(own)


@pytest.mark.slow
def test_the_command_reads_a_model_with_the_adapters_merged(two_ranks: Ranks, folder: Path) -> None:
    own = greedy(folder)
    own.model.lora = LoraConfig(export="adapter")
    two_ranks.run(runs.run_training, own, timeout=TIMEOUT)
    other = by_command(own, folder)
    two_ranks.run(runs.run_training, other, timeout=TIMEOUT)
    assert drawn(other, "round-02") == drawn(own, "round-02")


def on_hosts_of_their_own(settings: Recipe) -> None:
    """Train as if every rank were the first of its host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_group, "local_rank", lambda: 0)
        runs.run_training(settings)


def test_every_host_answers_a_share_of_the_prompts(two_ranks: Ranks, folder: Path) -> None:
    settings = runs.recipe(folder, selfgen=GREEDY["own_samples"])
    one = by_command(settings, folder / "one", "letters", str(folder))
    two_ranks.run(runs.run_training, one, timeout=TIMEOUT)
    two = by_command(settings, folder / "two", "letters", str(folder))
    two_ranks.run(on_hosts_of_their_own, two, timeout=TIMEOUT)
    assert drawn(two, "round-01") == drawn(one, "round-01")
    whole, *shares = [set(line.split()) for line in (folder / "asked").read_text().splitlines()]
    assert [len(share) for share in shares] == [20, 20]
    assert shares[0] | shares[1] == whole


ANSWERED = "39 of 40 prompts have a good answer, and a new start asks for the others only"
FAULTS = {
    "crash": (
        r"the command failed with exit status 7; it last said: loading the weights / no memory is left "
        r"\(all of it: \S+/rollouts/round-01\.partial/command/output-00\.txt\); a new start asks only for the answers "
        r"that are missing",
        38,
    ),
    "missing": (rf"\S+/command: the prompt '1-0' has no answer; {ANSWERED}.*", 1),
    "double": (
        rf"\S+/answers-00\.jsonl, line 3: field 'id': '1-0' is answered twice, first at \S+, line 2; {ANSWERED}.*",
        1,
    ),
    "foreign": (
        rf"\S+/answers-00\.jsonl, line 2: field 'id': expected the id of a prompt, got '1000-0'; {ANSWERED}.*",
        1,
    ),
}
"""Mode of the command -> the error, and the number of prompts that the next start asks for."""


def start(settings: Recipe, folder: Path) -> Run:
    """Start the training of a recipe on two ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(to_yaml(settings), encoding="utf-8")
    return Run(["train", "--config", str(folder / "recipe.yaml")], folder)


@matrix("mode", FAULTS)
def test_a_faulty_command_is_one_line_and_the_next_start_asks_for_the_rest(folder: Path, mode: str) -> None:
    expected, left = FAULTS[mode]
    settings = runs.recipe(folder, selfgen=GREEDY["own_samples"])
    broken = start(by_command(settings, folder, mode, str(folder)), folder / "broken")
    assert broken.wait() == [2, 2], broken.output(0)[-3000:]
    for rank in range(2):
        lines = [line for line in broken.output(rank).splitlines() if "error: " in line]
        assert "Traceback" not in broken.output(rank)
        assert len(lines) == (rank == 0), lines
    told = next(line for line in broken.output(0).splitlines() if "error: " in line)
    assert re.fullmatch(rf"selfgen-ds: error: selfgen\.generate_command: {expected}", told), told
    mended = by_command(settings, folder, "letters", str(folder))
    again = start(mended, folder / "again")
    assert again.wait() == [0, 0], again.output(0)[-3000:]
    first, second = (line.split() for line in (folder / "asked").read_text().splitlines())
    assert len(first) == 40
    assert len(second) == left
    assert len(drawn(mended, "round-01")) == 40


def processes(folder: Path) -> list[psutil.Process]:
    """Return the processes of a command that hangs."""
    return [psutil.Process(int(pid)) for pid in (folder / "pids").read_text().split()]


def wait_for_the_end_of(commands: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 15.0
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in commands):
        assert time.monotonic() < deadline, "a process of the command is left"
        time.sleep(0.05)


@matrix("end", ["signal", "kill"])
def test_nothing_of_the_command_outlives_the_run_and_its_answers_are_kept(folder: Path, end: str) -> None:
    settings = runs.recipe(folder, selfgen=GREEDY["own_samples"])
    settings.train.stall_seconds = 2.0  # no stall is noticed while the ranks wait for a command
    run = start(by_command(settings, folder, "hang", str(folder)), folder / "hanging")
    run.until((folder / "pids").exists)
    time.sleep(6.0)
    commands = processes(folder)
    assert all(process.is_running() for process in commands)
    if end == "signal":
        assert run.processes[1].pid is not None
        psutil.Process(run.processes[1].pid).send_signal(signal.SIGTERM)
        assert run.wait() == [3, 3], run.output(0)[-3000:]
    else:
        run.kill()
    wait_for_the_end_of(commands)
    assert "train.stall_seconds" not in run.output(0)
    mended = by_command(settings, folder, "letters", str(folder))
    again = start(mended, folder / "again")
    assert again.wait() == [0, 0], again.output(0)[-3000:]
    assert [len(line.split()) for line in (folder / "asked").read_text().splitlines()] == [40, 38]
    assert len(drawn(mended, "round-01")) == 40
