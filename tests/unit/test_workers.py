"""Runs that several processes carry out together: what each leaves to the others, and what they learn of failures."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from selfgen_ds.errors import RunFailed
from selfgen_ds.pilot import workers
from selfgen_ds.pilot.launching import Place
from selfgen_ds.pilot.runs import Arm, StudyRun

ONE = [Place(ranks=1, devices=[], threads=1)]


def _runs(folder: Path, *names: str) -> list[StudyRun]:
    """Return runs by names such as `sft-0`."""
    found = []
    for name in names:
        arm, seed = name.split("-")
        own: dict[str, Any] = {"recipe": "recipe.yaml", "steps": 4, "evaluation": {}}
        found.append(StudyRun(arm=Arm(name=arm, settings={}), seed=int(seed), folder=folder / name, **own))
    return found


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that are begun, whose commands do nothing; those of the arm `bad` fail."""
    names: list[str] = []

    def run(arguments: list[str], place: Place, log: Path, stop: object) -> None:
        name = log.name.removesuffix(".log")
        (log.parent / name).mkdir(exist_ok=True)
        if arguments[0] == "train":
            names.append(name)
        if name.startswith("bad"):
            raise RunFailed("out of luck")

    monkeypatch.setattr(workers.launching, "run", run)
    return names


def _when(name: str, then: Callable[[], object], begun: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen when a run is begun, as if another process did it."""
    run = workers.launching.run

    def with_other(arguments: list[str], place: Place, log: Path, stop: Any) -> None:
        if log.name == f"{name}.log":
            then()
        run(arguments, place, log, stop)

    monkeypatch.setattr(workers.launching, "run", with_other)


def test_after_a_failure_no_other_run_of_the_arm_is_begun(tmp_path: Path, begun: list[str]) -> None:
    runs = _runs(tmp_path, "bad-0", "good-0", "bad-1", "good-1")
    failures = workers.carry_out(runs, ONE)
    assert begun == ["bad-0", "good-0", "good-1"]
    assert {name: str(error) for name, error in failures.items()} == {"bad": "out of luck"}
    assert [run.done for run in runs] == [False, True, False, True]


def test_a_run_that_failed_is_tried_again_by_the_next_call(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = _runs(tmp_path, "bad-0")
    workers.carry_out(runs, ONE)
    monkeypatch.setattr(workers.launching, "run", lambda *_: (tmp_path / "bad-0").mkdir(exist_ok=True))
    assert workers.carry_out(runs, ONE) == {}
    assert runs[0].done
    assert not runs[0].failure.exists()


def test_a_run_that_another_process_tried_in_vain_is_not_tried_again(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = _runs(tmp_path, "good-0", "other-0", "other-1")
    _when("good-0", lambda: runs[1].failure.write_text("failed elsewhere"), begun, monkeypatch)
    failures = workers.carry_out(runs, ONE)
    assert begun == ["good-0"]
    assert {name: str(error) for name, error in failures.items()} == {"other": "failed elsewhere"}


def test_a_failure_of_a_run_that_was_left_to_another_process_is_learned_at_the_end(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = _runs(tmp_path, "other-0", "good-0")
    _when("good-0", lambda: runs[0].failure.write_text("failed elsewhere"), begun, monkeypatch)
    with FileLock(tmp_path / "other-0.lock"):
        failures = workers.carry_out(runs, ONE)
    assert begun == ["good-0"]
    assert list(failures) == ["other"], "or no process would report the other arms"


def test_a_run_that_another_process_tries_again_in_vain_is_a_failure(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both processes were started again after a failure; the other one takes the run first."""
    runs = _runs(tmp_path, "other-0", "good-0")
    runs[0].failure.write_text("failed before")
    os.utime(runs[0].failure, (1, 1))
    _when("good-0", lambda: runs[0].failure.write_text("failed again"), begun, monkeypatch)
    with FileLock(tmp_path / "other-0.lock"):
        failures = workers.carry_out(runs, ONE)
    assert {name: str(error) for name, error in failures.items()} == {"other": "failed again"}


def test_a_run_that_another_process_still_carries_out_is_no_failure(tmp_path: Path, begun: list[str]) -> None:
    runs = _runs(tmp_path, "other-0", "good-0")
    with FileLock(tmp_path / "other-0.lock"):
        assert workers.carry_out(runs, ONE) == {}
    assert [run.done for run in runs] == [False, True]


def test_a_run_is_done_as_far_as_its_steps_and_its_evaluation_say(tmp_path: Path) -> None:
    (run,) = _runs(tmp_path, "sft-0")
    assert run.share_done() == 0
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text("{}\n" * 2)
    assert 0.4 < run.share_done() < 0.5
    (run.folder / "metrics.jsonl").write_text("{}\n" * 4)
    assert 0.8 < run.share_done() < 1
    run.mark("evaluated")
    assert run.share_done() == 1
