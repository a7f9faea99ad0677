"""Curves in bins: as many tokens as a bin needs, and the interval of Wilson."""

import numpy as np
import pytest

from selfgen_ds.evaluation.curves import binned


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
