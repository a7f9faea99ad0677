"""The journal of an evaluation: what an earlier start has left is not computed again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from selfgen_ds.evaluation.journal import Journal
from selfgen_ds.evaluation.metrics import SampleScore
from tests.batches import sample


def _score(sample_id: int) -> SampleScore:
    return SampleScore(
        sample_id=sample_id,
        prompt="p",
        reference="r",
        answer="é",
        teacher_forced=[True],
        free_running=[False],
        log_likelihoods=[-0.1],
        own_log_likelihoods=[-0.2],
        statistics={"loss": [0.1 + 0.2, 1.0]},
    )


def _journal(tmp_path: Path, key: str = "one") -> Journal:
    return Journal(tmp_path / "evaluation.journal", key)


def test_scores_come_back_as_they_were(tmp_path: Path) -> None:
    _journal(tmp_path).keep([_score(0), _score(1)])
    shares = [[sample([1], [2], 0)], [sample([1], [2], 1)]]
    assert _journal(tmp_path).kept(shares) == [_score(0), _score(1)]


def test_a_batch_with_a_row_that_is_missing_is_computed_again(tmp_path: Path) -> None:
    _journal(tmp_path).keep([_score(0)])
    assert _journal(tmp_path).kept([[sample([1], [2], 0), sample([1], [2], 1)]]) is None


def test_scores_of_other_options_are_not_taken(tmp_path: Path) -> None:
    _journal(tmp_path).keep([_score(0)])
    assert _journal(tmp_path, key="two").scores == {}
    assert _journal(tmp_path, key="one").scores == {}, "the file is written anew"
    assert (tmp_path / "evaluation.journal.old").exists()


def test_a_line_that_was_cut_is_left_out_and_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    _journal(tmp_path).keep([_score(0), _score(1)])
    path = tmp_path / "evaluation.journal"
    path.write_text(path.read_text()[:-20])
    journal = _journal(tmp_path)
    assert list(journal.scores) == [0]
    journal.keep([_score(1)])
    assert list(_journal(tmp_path).scores) == [0, 1]


def test_a_line_that_was_cut_within_a_letter_and_unusual_line_ends_do_no_harm(tmp_path: Path) -> None:
    score = replace(_score(0), answer="a\u2028b\u0085c")
    _journal(tmp_path).keep([score, _score(1)])
    path = tmp_path / "evaluation.journal"
    path.write_bytes(path.read_bytes().split("é".encode())[0] + "é".encode()[:1])
    assert _journal(tmp_path).scores == {0: score}
