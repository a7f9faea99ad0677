"""The judge, against a real local server: verdicts, order of the answers, resuming, and what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from selfgen_ds.errors import InputError
from selfgen_ds.evaluation import judge, predictions
from selfgen_ds.evaluation.judge import Judge, length_controlled, other_answers
from selfgen_ds.evaluation.metrics import SampleScore
from tests.judge_server import Server, serving


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(judge, "_PAUSE", 0.01)
    with serving() as running:
        yield running


def _score(sample_id: int, answer: str) -> SampleScore:
    return SampleScore(
        sample_id=sample_id,
        prompt="a prompt",
        reference="gg",
        answer=answer,
        teacher_forced=[],
        free_running=[],
        log_likelihoods=[],
        own_log_likelihoods=[],
        statistics={},
    )


def _judge(server: Server, tmp_path: Path, model: str = "referee") -> Judge:
    host, port = server.server_address[:2]
    return Judge(url=f"http://{host!s}:{port}/v1/", model=model, journal=tmp_path / "judge.jsonl")


SCORES = [_score(0, "ggg"), _score(1, "g"), _score(2, "gg")]


def test_a_win_counts_in_both_orders_and_a_preference_for_a_place_is_half_a_win(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert _judge(server, tmp_path).verdicts(SCORES, ["gg"] * 3).wins == [1.0, 0.0, 0.5]
    assert len(server.requests) == 6
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert {request["key"] for request in server.requests} == {"Bearer secret"}
    assert all("a prompt" in request["messages"][0]["content"] for request in server.requests)


def test_verdicts_that_were_given_are_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    _judge(server, tmp_path).verdicts(SCORES[:2], ["gg"] * 2)
    with open(tmp_path / "judge.jsonl", "a") as file:
        file.write('["cut')
    assert _judge(server, tmp_path).verdicts(SCORES, ["gg"] * 3).wins == [1.0, 0.0, 0.5]
    assert len(server.requests) == 6


def test_a_judge_that_is_busy_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.failures = 2
    assert _judge(server, tmp_path).verdicts(SCORES, ["gg"] * 3).wins == [1.0, 0.0, 0.5]


def test_a_tie_is_half_a_win(server: Server, tmp_path: Path) -> None:
    server.says = "tie"
    assert _judge(server, tmp_path).verdicts(SCORES, ["gg"] * 3).wins == [0.5] * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[(text, "A") for text in ("A", "**A**", "a.", '"A"', "[[A]]", "<think>B is short</think> I say: Answer A")],
        *[(text, "B") for text in ("Answer: B", "My reasons are long.\n\nB", "B is better.", "The winner is **B**.")],
        *[(text, "TIE") for text in ("tie", "TIE", "Tie.", "It is a tie.", "Verdict: tie")],
        *[(text, None) for text in ("", "I cannot judge this", "B is better, because A has a wrong number.")],
        *[(text, None) for text in ("I prefer B. A is wrong", "neither; it is a tie between A and B", "A or B", "Bad")],
    ],
)
def test_a_verdict_stands_at_the_end(text: str, expected: str | None) -> None:
    assert judge.verdict_in(text) == expected


def test_what_is_no_verdict_is_a_tie_and_is_asked_for_again(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _judge(server, tmp_path).verdicts(SCORES[:1], ["gg"])
    server.says = "I cannot judge this"
    found = _judge(server, tmp_path).verdicts(SCORES[:2], ["gg"] * 2)
    assert (found.wins, found.unclear) == ([1.0, 0.5], 0.5)
    assert "2 of 4 verdicts were none of A, B and tie, and count as ties" in caplog.text
    server.says = None
    assert _judge(server, tmp_path).verdicts(SCORES[:2], ["gg"] * 2).wins == [1.0, 0.0]


def test_a_judge_without_any_verdict_is_refused(server: Server, tmp_path: Path) -> None:
    server.says = "I think they are both nice"
    with pytest.raises(InputError, match="--judge_model: no verdict of referee was one of A, B and tie"):
        _judge(server, tmp_path).verdicts(SCORES, ["gg"] * 3)


def test_pairs_that_are_decided_by_the_order_alone_are_counted(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.says = "A"
    found = _judge(server, tmp_path).verdicts(SCORES, ["gg"] * 3)
    assert (found.wins, found.by_place) == ([0.5] * 3, 1.0)
    assert "3 of 3 pairs were decided by the answers' order alone; they count as ties" in caplog.text


def test_a_server_that_is_just_starting_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.failures = 1
    _judge(server, tmp_path).check()
    assert len(server.requests) == 2


@pytest.mark.parametrize("sent", [b'{"error": {"message": "model not found"}}', b"<html>model not found</html>"])
def test_what_a_server_says_instead_of_a_verdict_is_shown(server: Server, tmp_path: Path, sent: bytes) -> None:
    server.sends = sent
    with pytest.raises(InputError, match=r"gives no verdict: it answers .*model not found"):
        _judge(server, tmp_path).check()
    assert len(server.requests) == 2, "a server that is there answers soon"


def test_another_judge_is_asked_anew(server: Server, tmp_path: Path) -> None:
    _judge(server, tmp_path).verdicts(SCORES, ["gg"] * 3)
    server.says = "tie"
    other = replace(_judge(server, tmp_path), model="referee 2")
    assert other.verdicts(SCORES, ["gg"] * 3).wins == [0.5] * 3


def test_a_judge_that_is_not_there_is_one_line(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chat/completions gives no verdict: 404 Not Found: '"):
        _judge(server, tmp_path, model="nobody").verdicts(SCORES, ["gg"] * 3)
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"gives no verdict: URLError: .*; the verdicts so far are kept"):
        _judge(server, tmp_path).verdicts(SCORES, ["gg"] * 3)


def test_answers_are_compared_with_references_or_with_another_evaluation(tmp_path: Path) -> None:
    assert other_answers("reference", SCORES) == ["gg"] * 3
    predictions.write(tmp_path / "predictions.jsonl", [_score(i, f"other {i}") for i in (2, 1, 0)])
    assert other_answers(str(tmp_path), SCORES) == ["other 0", "other 1", "other 2"]
    with pytest.raises(InputError, match="lacks 1 of 4 rows, the first is row 7"):
        other_answers(str(tmp_path), [*SCORES, _score(7, "g")])
    with pytest.raises(InputError, match="no predictions of an evaluation"):
        other_answers(str(tmp_path / "missing"), SCORES)


def test_the_length_controlled_rate_takes_out_a_preference_for_length() -> None:
    """Wins are drawn from the model that is fitted: the answers win with 0.3 at equal length, and more if longer."""
    rng = np.random.default_rng(0)
    differences = rng.integers(-20, 81, size=4000)  # most answers are longer than the others
    answers, others = ["x" * (100 + d) for d in differences], ["x" * 100] * 4000
    logits = math.log(0.3 / 0.7) + 2.0 * np.tanh(differences / differences.std())
    wins = (rng.random(4000) < 1 / (1 + np.exp(-logits))).astype(float).tolist()
    found = length_controlled(wins, answers, others)
    assert np.mean(wins) > 0.5
    assert found["low"] < 0.3 < found["high"]
    assert found["value"] == pytest.approx(0.3, abs=0.05)


def test_answers_of_one_length_have_the_plain_win_rate() -> None:
    found = length_controlled([1.0, 0.0, 1.0, 1.0], ["abc"] * 4, ["xyz"] * 4)
    assert found["value"] == pytest.approx(0.75, abs=0.005)
