"""Progress in a file: whole lines with the time, and no control characters."""

import os
import re
import subprocess
import sys
import time

import pytest
from tqdm import tqdm

from selfgen_ds import progress
from tests.ranks import ROOT


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)


def _lines(text: str) -> list[str]:
    assert "\r" not in text
    assert "\x1b" not in text
    return text.splitlines()


def test_in_a_file_every_state_is_a_line_with_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("train", "step", total=3) as bar:
        for step in range(3):
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    lines = _lines(capsys.readouterr().err)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d train: step 1 of 3, .* so far, .* left, loss 0", lines[1])
    assert lines[-1].endswith("loss 2")


def test_an_inner_bar_does_not_move_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("train", "step", total=2) as bar:
        for _ in progress.bar("evaluate", "batch", iterable=range(2), total=2, leave=False):
            bar.update()
    lines = _lines(capsys.readouterr().err)
    assert any(" evaluate: batch 1 of 2, " in line for line in lines)


def test_lines_are_some_seconds_apart(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.5)
    with progress.bar("train", "step", total=20) as bar:
        for _ in range(20):
            bar.update()
            time.sleep(0.05)
    assert 2 <= len(_lines(capsys.readouterr().err)) <= 6


def test_on_a_terminal_it_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.bar("train", "step", total=2) as bar:
        bar.update()
    assert "|" in capsys.readouterr().err


def test_a_disabled_bar_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress.bar("evaluate", "batch", iterable=range(3), total=3, disable=True):
        pass
    assert capsys.readouterr().err == ""


def test_only_a_bar_on_stderr_itself_leaves_a_line_open() -> None:
    assert not progress.line_is_open()
    with progress.bar("train", "step", total=2):
        assert not progress.line_is_open()
    with tqdm(total=2):  # as a library draws it
        assert progress.line_is_open()


def test_a_terminal_without_columns_gets_lines() -> None:
    leader, follower = os.openpty()  # whose size is 0 x 0 until somebody sets it
    code = "from selfgen_ds.progress import bar\nfor _ in bar('work', 'step', iterable=[1], total=1): pass"
    subprocess.run([sys.executable, "-c", code], stderr=follower, cwd=ROOT, check=True)
    assert b"work: step 1 of 1" in os.read(leader, 10_000)
    os.close(leader)
    os.close(follower)


def test_a_bar_that_another_thread_is_about_to_make_is_not_open() -> None:
    half_made = tqdm.__new__(tqdm)  # tqdm knows it already
    assert not hasattr(half_made, "fp")
    try:
        assert not progress.line_is_open()
    finally:
        tqdm._instances.discard(half_made)  # type: ignore[attr-defined]
