import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.errors import InputError
from selfgen_ds.methods.bash import Bash
from selfgen_ds.methods.method import RoundMethod
from selfgen_ds.methods.rac import Rac
from selfgen_ds.rounds.checks import rows_problem
from selfgen_ds.rounds.rounds import Rounds, _chunk_size, _unread
from selfgen_ds.rounds.store import Writer
from tests.batches import sample
from tests.plans import plan

OURS = {"model": "m1", "tokenizer": "t1", "data": "d1"}


def _drawn(
    folder: Path,
    number: int = 1,
    *,
    length: int = 6,
    method: str = "bash",
    fingerprint: dict[str, str] | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write a complete round of one row and return its folder."""
    row = _row(0, length)
    writer = Writer(folder / f"round-{number:02d}")
    origin = OURS | {"weights": "w"} | (fingerprint or {})
    audit = writer.start(
        {"method": method, "fingerprint": origin, "settings": settings or {}, "replace_probability": 0.25}
    )
    writer.write(0, [row], {}, 0.5)
    writer.finish(1, audit)
    return writer.folder


def _open(folder: Path, shared: Path | None = None, step: int = 0) -> Rounds:
    """Open the rounds of a run of `bash`: the checks before the first step."""
    parts: dict[str, Any] = dict.fromkeys(("engine", "policy", "plain"))
    return Rounds(
        **parts,
        method=Bash(SelfgenConfig(method="bash"), plan(max_length=6)),
        samples=[],
        folder=folder,
        shared=shared,
        fingerprint=OURS,
        settings={"method": "bash"},
        step=step,
    ).open()


def test_rounds_of_the_same_model_tokenizer_and_data_are_taken(tmp_path: Path) -> None:
    _drawn(tmp_path / "own", 1)
    _drawn(tmp_path / "others", 2)
    _open(tmp_path / "own", tmp_path / "others")
    _open(tmp_path / "not there yet")


@pytest.mark.parametrize("what", OURS)
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_round_of_another_origin_is_refused_with_both_fingerprints(
    what: str, is_shared: bool, tmp_path: Path
) -> None:
    _drawn(tmp_path / "rollouts", 1)
    folder = _drawn(tmp_path / "rollouts", 2, fingerprint={what: "x9"})
    with pytest.raises(InputError) as caught:
        _open(tmp_path / "none", tmp_path / "rollouts") if is_shared else _open(tmp_path / "rollouts")
    setting = "selfgen.rollouts" if is_shared else "output_dir"
    origin = {"model": "starting model"}.get(what, what)
    assert str(caught.value) == f"{setting}: {folder} was drawn from another {origin}: expected {OURS[what]}, got x9"


def test_a_round_of_another_method_is_refused(tmp_path: Path) -> None:
    folder = _drawn(tmp_path, method="rac")
    with pytest.raises(InputError, match=rf"^output_dir: {folder} was drawn by rac, not by bash$"):
        _open(tmp_path)


def test_a_round_of_longer_rows_is_refused(tmp_path: Path) -> None:
    folder = _drawn(tmp_path, length=7)
    with pytest.raises(InputError, match=rf"^output_dir: {folder} has rows of 7 tokens, more than data\.max_length=6$"):
        _open(tmp_path)


def test_a_round_drawn_with_other_settings_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _drawn(tmp_path, settings={"method": "bash", "temperature": 2.0})
    with caplog.at_level(logging.WARNING, "selfgen_ds"):
        _open(tmp_path)
    assert caplog.messages == [f"{folder} was drawn with other settings: temperature was 2.0 and is now None"]


def test_a_damaged_round_is_refused_before_the_first_step(tmp_path: Path) -> None:
    folder = _drawn(tmp_path)
    (folder / "rows-000000.arrow").write_bytes(b"")
    with pytest.raises(InputError, match=rf"^output_dir: {folder} is broken \(rows-000000\.arrow\); "):
        _open(tmp_path)


def test_a_round_that_is_over_or_put_aside_is_not_looked_at(tmp_path: Path) -> None:
    folder = _drawn(tmp_path)
    (folder / "rows-000000.arrow").write_bytes(b"")
    _open(tmp_path, step=2)  # of the second round
    with pytest.raises(InputError, match="broken"):
        _open(tmp_path, step=1)
    folder.rename(folder.with_name("round-01.damaged"))
    _open(tmp_path)


def test_a_round_that_the_run_does_not_reach_is_not_looked_at(tmp_path: Path) -> None:
    _drawn(tmp_path, 2, fingerprint={"model": "x9"})
    _drawn(tmp_path, 3, fingerprint={"model": "x9"})
    with pytest.raises(InputError, match="round-02 was drawn from another starting model"):
        _open(tmp_path)
    (tmp_path / "round-02").rename(tmp_path / "round-100")
    _open(tmp_path)


def test_a_shared_round_that_is_gone_is_drawn_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = tmp_path / "rollouts"
    _drawn(shared, 1)
    _drawn(shared, 2)
    _open(tmp_path / "own", shared)
    shutil.rmtree(shared)
    with caplog.at_level(logging.WARNING, "selfgen_ds"):
        _open(tmp_path / "own", shared, step=2)  # of the second round
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"{shared / 'round-02'} no longer exists; drawing this round here"]


def test_another_runs_rounds_are_those_that_there_were_at_the_first_start(tmp_path: Path) -> None:
    shared = tmp_path / "rollouts"
    _drawn(shared, 1)
    _open(tmp_path / "own", shared)
    _drawn(shared, 2, fingerprint={"model": "x9"})
    _open(tmp_path / "own", shared)
    with pytest.raises(InputError, match="another starting model"):
        _open(tmp_path / "another", shared)


def test_a_round_that_is_being_drawn_is_not_looked_at(tmp_path: Path) -> None:
    folder = _drawn(tmp_path, fingerprint={"model": "x9"})
    folder.rename(folder.with_name("round-01.partial"))
    _open(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rollouts", "holds no complete round, such as round-01"),
        ("nothing", "expected an existing folder, another run's"),
    ],
)
def test_a_folder_without_a_complete_round_is_refused(name: str, expected: str, tmp_path: Path) -> None:
    _drawn(tmp_path / "rollouts").rename(tmp_path / "rollouts" / "round-01.partial")
    with pytest.raises(InputError, match=r"^selfgen\.rollouts: ") as caught:
        _open(tmp_path / "own", tmp_path / name)
    assert expected in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("samples", "rows_at_once", "expected"),
    [
        (20, 64, 5),  # four chunks, so that something is left when a run is killed
        (2123, 64, 128),  # twice the rows that can be generated at once
        (2123, 8, 67),  # 32 chunks
        (1_000_000, 64, 256),
        (1_000_000, 200, 400),
        (1, 64, 1),
    ],
)
def test_chunks_show_progress_and_are_enough_to_generate_at_once(
    samples: int, rows_at_once: int, expected: int
) -> None:
    assert _chunk_size(samples, rows_at_once) == expected


def _row(sample_id: int, length: int, **changes: Any) -> TrainingRow:
    row = TrainingRow.reference(sample_id, np.arange(length), np.array([[2, length, length]]))
    return replace(row, **changes)


SAMPLES = [sample([1, 2], [3, 4], 7), sample([1], [3, 4], 8)]


def _method(kind: type[RoundMethod]) -> RoundMethod:
    return kind(SelfgenConfig(method="bash"), plan(max_length=6))


def test_rows_that_fit_their_samples_are_taken() -> None:
    assert rows_problem(_method(Bash), SAMPLES, [_row(7, 4), _row(8, 3)]) is None
    for rows in ([_row(7, 4), _row(8, 3)], [_row(7, 6), _row(7, 5), _row(8, 6)], [_row(8, 2)], []):
        assert rows_problem(_method(Rac), SAMPLES, rows) is None


@pytest.mark.parametrize(
    ("method", "rows", "expected"),
    [
        (Bash, [_row(7, 4)], r"one row for each of samples \[7, 8\] .* got rows for samples \[7\]"),
        (Bash, [_row(8, 3), _row(7, 4)], r"one row for each of samples \[7, 8\] .* got rows for samples \[8, 7\]"),
        (Bash, [_row(7, 4), _row(8, 4)], "sample 8 has become longer or shorter"),
        (Rac, [_row(8, 4), _row(7, 4)], r"in their order, got rows of samples \[8, 7\]"),
        (Rac, [_row(7, 4), _row(9, 4)], r"rows of samples \[7, 8\] ..., in their order, got rows of samples \[7, 9\]"),
        (Rac, [_row(7, 7)], r"sample 7 has 7 tokens, more than data\.max_length=6"),
        (Rac, [_row(7, 4, loss_mask=np.ones(3, bool))], "sample 7 has arrays of several lengths"),
    ],
)
def test_rows_that_do_not_fit_are_named(method: type[RoundMethod], rows: list[TrainingRow], expected: str) -> None:
    assert re.search(expected, rows_problem(_method(method), SAMPLES, rows) or "")


@pytest.mark.parametrize(
    ("epoch_size", "step_size", "total_steps", "unread"),
    [
        (8, 4, 4, [0, 0]),
        (40, 16, 5, [0, 0]),  # a step with rows of both rounds
        (43, 16, 2, [0]),  # the last step would not be full
        (64, 4, 3, [52]),
        (64, 4, 17, [0, 60]),
    ],
)
def test_rows_of_a_round_that_the_run_ends_before_are_counted(
    epoch_size: int, step_size: int, total_steps: int, unread: list[int]
) -> None:
    sizes = {"epoch_size": epoch_size, "step_size": step_size, "total_steps": total_steps}
    method = Bash(SelfgenConfig(method="bash"), plan(**sizes))
    assert [_unread(method, number) for number in range(method.rounds)] == unread
