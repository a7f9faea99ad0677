"""`predictions.jsonl` gives back what was written; a file that is something else is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfgen_ds.comparison.run_scores import read_scores
from selfgen_ds.errors import InputError
from selfgen_ds.evaluation import predictions
from selfgen_ds.evaluation.metrics import SampleScore


def _score(sample_id: int, text: str = "a", **statistics: list[float]) -> SampleScore:
    return SampleScore(
        sample_id=sample_id,
        prompt=f"prompt {text}",
        reference=f"reference {text}",
        answer=f"answer {text}",
        teacher_forced=[True, False],
        free_running=[False, True],
        log_likelihoods=[-0.1, -0.2],
        own_log_likelihoods=[-0.3],
        statistics=statistics,
        recovery=[[True]],
        divergences=[[0.5], [0.25]],
        other_answers={"sampled_1": [text]},
    )


@pytest.mark.parametrize("text", ["plain", "lines\nand\r\nmore", "\u2028 \u2029 \x85 \x0b \x1c", ""])
def test_scores_with_any_text_come_back_as_they_were(tmp_path: Path, text: str) -> None:
    scores = [_score(0, text, loss=[1.0, 2.0]), _score(1, text)]
    predictions.write(tmp_path / "predictions.jsonl", scores)
    assert list(predictions.read(tmp_path / "predictions.jsonl")) == scores


@pytest.mark.parametrize("line", ["[1]", "7", '{"sample_id": 0}', '{"sample_id": 0', ""])
def test_a_line_that_is_something_else_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "predictions.jsonl"
    predictions.write(path, [_score(0)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"predictions.jsonl: line 2 is not as this version of evaluate writes it; ev"):
        list(predictions.read(path))


def test_a_row_that_does_not_count_a_metric_has_zeros_in_its_column(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    scores = [_score(3, exact=[1.0, 1.0]), _score(5, three=[1.0, 2.0, 3.0]), _score(7, exact=[0.0, 1.0])]
    predictions.write(path, scores)
    found = read_scores(path)
    assert found.sample_ids.tolist() == [3, 5, 7]
    assert found.statistics["exact"].tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]
    assert found.statistics["three"].tolist() == [[0.0] * 3, [1.0, 2.0, 3.0], [0.0] * 3]
    assert found.examples == scores


def test_other_references_have_another_checksum(tmp_path: Path) -> None:
    found = set()
    for texts in (["a", "b"], ["a", "c"], ["ab", ""], ["a", "b"]):
        predictions.write(tmp_path / "predictions.jsonl", [_score(i, text) for i, text in enumerate(texts)])
        found.add(read_scores(tmp_path / "predictions.jsonl").references)
    assert len(found) == 3


def test_statistics_of_another_size_are_named(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    predictions.write(path, [_score(0, exact=[1.0, 1.0]), _score(1, exact=[1.0, 1.0])])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["statistics"]["exact"] = [1.0]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="row 1: exact has 1 numbers, and 2 in the rows before"):
        read_scores(path)
