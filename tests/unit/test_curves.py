"""Curves in bins: as many tokens as a bin needs, and the interval of Wilson."""

from collections.abc import Sequence

import numpy as np
import pytest

from selfgen_ds.evaluation.curves import Curve, Curves, PositionSums
from selfgen_ds.evaluation.metrics import SampleScore


def binned(rows: Sequence[Sequence[float]], bins: int = 20) -> Curve:
    sums = PositionSums(flags=True)
    for row in rows:
        sums.add(row)
    return sums.binned(bins)


def test_bins_hold_every_token_once() -> None:
    rng = np.random.default_rng(0)
    rows = [(rng.random(rng.integers(1, 200)) < 0.7).tolist() for _ in range(50)]
    curve = binned(rows)
    assert 2 <= len(curve.mean) <= 20
    assert sorted(curve.positions) == curve.positions
    right = sum(map(sum, rows))
    whole = binned(rows, bins=1)
    assert whole.mean == [pytest.approx(right / sum(map(len, rows)))]


def test_few_tokens_are_one_bin() -> None:
    curve = binned([[True, False, True, True]] * 6)
    assert curve.mean == [0.75]
    assert curve.positions == [2.5]


def test_positions_of_many_rows_stay_apart() -> None:
    curve = binned([[True, False, True]] * 40)
    assert (curve.positions, curve.mean) == ([1.0, 2.0, 3.0], [1.0, 0.0, 1.0])


def test_the_interval_is_that_of_wilson() -> None:
    # Of 15 right tokens of 50: the two shares p at which |0.3 - p| = 1.96 sqrt(p (1 - p) / 50).
    curve = binned([[i < 15] for i in range(50)])
    for end in (curve.low[0], curve.high[0]):
        assert abs(0.3 - end) == pytest.approx(1.96 * (end * (1 - end) / 50) ** 0.5)
    certain = binned([[True]] * 50)
    assert certain.low[0] < 1.0
    assert certain.high[0] == pytest.approx(1.0)


def _score(teacher_forced: list[bool], divergences: list[list[float]]) -> SampleScore:
    return SampleScore(
        sample_id=0,
        prompt="",
        reference="",
        answer="",
        teacher_forced=teacher_forced,
        free_running=teacher_forced,
        log_likelihoods=[-float(i) for i in range(len(teacher_forced))],
        own_log_likelihoods=[-1.0],
        statistics={},
        divergences=divergences,
    )


def test_sums_of_several_runs_are_those_of_all_their_rows() -> None:
    rows = [_score([True, False, True], []), _score([False], []), _score([True, True], [])]
    whole, parts = Curves(rows).to_json(), (Curves(rows[:1]) + Curves(rows[1:])).to_json()
    assert whole == parts
    assert whole["teacher_forced"] == [pytest.approx(2 / 3), 0.5, 1.0]
    assert whole["teacher_forced_log_likelihood"] == [0.0, -1.0, -2.0]
    assert "recovery" not in whole
    assert "excess_error" not in whole


def test_the_excess_error_up_to_a_length_sums_what_came_before() -> None:
    rows = [_score([True], [[1.0, 3.0], [1.0, 1.0]]), _score([True], [[2.0], [1.0]])]
    # After own tokens 1.5 and 3, after the reference's 1 and 1: 1.5 / 1 and 4.5 / 2.
    assert Curves(rows).to_json()["excess_error"] == [pytest.approx(50.0), pytest.approx(125.0)]
