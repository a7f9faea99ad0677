"""Intervals: against closed forms, and how often they find a difference that is not there."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from selfgen_ds.comparison.intervals import Sample, difference, holm, mean, wilson


def _sample(values: np.ndarray) -> Sample:
    """Return a mean of `[seeds, rows]` values."""
    statistics = np.stack([values, np.ones_like(values)], axis=-1)
    return Sample(statistics=statistics, of_sums=lambda sums: sums[..., 0] / sums[..., 1])


def test_the_interval_of_many_rows_is_that_of_the_normal_approximation() -> None:
    hits = (np.random.default_rng(0).random((1, 2000)) < 0.3).astype(float)
    found = mean(_sample(hits))
    half = 1.96 * math.sqrt(hits.mean() * (1 - hits.mean()) / 2000)
    assert (found.low, found.high) == pytest.approx((hits.mean() - half, hits.mean() + half), abs=0.1 * half)
    assert not found.seeds_known


def test_the_interval_of_seeds_alone_is_students() -> None:
    values = np.array([0.2, 0.5, 0.6])
    found = mean(_sample(np.repeat(values[:, None], 50, axis=1)))
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=values.std(ddof=1) / math.sqrt(3))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.seeds_known


def test_a_difference_that_is_the_same_on_every_row_is_certain() -> None:
    values = np.random.default_rng(0).random((1, 100))
    found = difference(_sample(values + 0.5), _sample(values), same_seeds=True)
    assert (found.low, found.value, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.p < 1e-6


def test_pairing_by_seed_takes_out_what_the_seeds_have_in_common() -> None:
    rng = np.random.default_rng(1)
    seeds, rows = np.array([[0.0], [5.0], [9.0]]), rng.normal(size=(1, 200))
    baseline, better = seeds + rows, seeds + rows + 0.3 + rng.normal(scale=0.01, size=(3, 200))
    paired = difference(_sample(better), _sample(baseline), same_seeds=True)
    apart = difference(_sample(better), _sample(baseline), same_seeds=False)
    assert 0.29 < paired.low < 0.3 < paired.high < 0.31
    assert apart.low < 0 < apart.high


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("same_seeds", [True, False])
def test_two_groups_of_the_same_method_rarely_differ(seeds: int, same_seeds: bool) -> None:
    """Seeds, rows and both together vary; at 95 % a twentieth of the comparisons may find a difference."""
    rng = np.random.default_rng(seeds)
    found, trials, rows = 0, 300, 40
    for _ in range(trials):
        of_rows = rng.normal(size=(1, rows))
        groups = [
            of_rows + rng.normal(scale=0.3, size=(seeds, 1)) + rng.normal(scale=0.5, size=(seeds, rows))
            for _ in range(2)
        ]
        found += difference(_sample(groups[0]), _sample(groups[1]), same_seeds).p < 0.05
    # a binomial count with 5 % chance exceeds this with a probability below 1 %
    assert found <= stats.binom.ppf(0.99, trials, 0.05)


@pytest.mark.parametrize("same_seeds", [True, False])
def test_two_seeds_that_happen_to_lie_close_together_show_no_more_than_students_t(same_seeds: bool) -> None:
    """The correction for many metrics asks for a small p, which must be as rare as it says."""
    rng = np.random.default_rng(7)
    found, trials, rows = 0, 600, 20
    for _ in range(trials):
        of_rows = rng.normal(size=(1, rows))
        groups = [of_rows + rng.normal(size=(2, 1)) + rng.normal(scale=0.5, size=(2, rows)) for _ in range(2)]
        found += difference(_sample(groups[0]), _sample(groups[1]), same_seeds).p < 0.003
    assert found <= stats.binom.ppf(0.99, trials, 0.003)


@pytest.mark.parametrize(("ours", "theirs"), [(1, 3), (3, 1)])
def test_a_single_seed_is_taken_to_vary_as_those_of_the_other_side(ours: int, theirs: int) -> None:
    rng = np.random.default_rng(11 + ours)
    found, trials, rows = 0, 300, 40
    for _ in range(trials):
        of_rows = rng.normal(size=(1, rows))
        one, other = (
            of_rows + rng.normal(scale=0.3, size=(seeds, 1)) + rng.normal(scale=0.3, size=(seeds, rows))
            for seeds in (ours, theirs)
        )
        estimate = difference(_sample(one), _sample(other), same_seeds=False)
        assert estimate.seeds_known
        found += estimate.p < 0.05
    assert found <= stats.binom.ppf(0.99, trials, 0.05)


def test_a_single_model_without_a_seed_does_not_vary() -> None:
    values = np.random.default_rng(0).random((1, 100))
    base = replace(_sample(values), fixed=True)
    seeds = np.array([0.1, 0.2, 0.3])[:, None] + values
    found = difference(_sample(seeds), base, same_seeds=False)
    low, high = stats.t.interval(0.95, 2, loc=0.2, scale=0.1 / math.sqrt(3))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert mean(base).seeds_known


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_nothing(value: float) -> None:
    values = np.random.default_rng(0).random((3, 100))
    broken = values.copy()
    broken[1, 7] = value
    found = difference(_sample(broken), _sample(values), same_seeds=True)
    assert found.p == 1.0
    assert not math.isfinite(found.low)


def test_a_known_difference_is_found() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(loc=loc, scale=0.1, size=(3, 1)) + rng.normal(size=(3, 200)) for loc in (0.0, 1.0)]
    found = difference(_sample(groups[1]), _sample(groups[0]), same_seeds=False)
    assert found.low > 0.5
    assert found.p < 0.01


def test_p_values_are_corrected_as_holm_does() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_a_share_of_no_row_has_wilsons_interval() -> None:
    low, high = wilson(0.0, 200)
    assert low == pytest.approx(0.0, abs=1e-12)
    assert high == pytest.approx(1.96**2 / (200 + 1.96**2))


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_few_rows_show_nothing_however_they_agree(rows: int) -> None:
    found = difference(_sample(np.ones((2, rows))), _sample(np.zeros((2, rows))), same_seeds=True)
    assert found.p == 1.0


def test_rows_that_a_metric_does_not_count_are_no_evidence() -> None:
    """Three rows of a thousand are counted."""
    values, weights = np.zeros((1, 1000)), np.zeros((1, 1000))
    weights[:, :3] = 1
    groups = [
        Sample(
            statistics=np.stack([value * weights, weights], axis=-1),
            of_sums=lambda sums: sums[..., 0] / np.maximum(sums[..., 1], 1e-9),
        )
        for value in (values, values + 1)
    ]
    assert difference(groups[1], groups[0], same_seeds=False).p == 1.0
    assert groups[1].counted.sum() == 3
