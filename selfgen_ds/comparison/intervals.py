"""Means of metrics over seeds and rows, their differences, and how sure one can be of them.

Two sources of chance are kept apart: the rows (all rows with one prompt are one, see `Group.sample`), which are drawn
again with replacement (Efron & Tibshirani 1993, chapter 6), and the seeds of the runs, whose values are few and get
Student's t. The interval of a mean is

    mean +- t * sqrt(variance of the rows + variance of the seeds)

with the degrees of freedom of Welch and Satterthwaite. These are too many where a few seeds happen to lie close
together, so an interval is never narrower than that of the seeds alone. A percentile bootstrap over two or three seeds
would be far too narrow. If one side of a difference has a single seed, the variance of the other side stands for both;
if both have, nothing is known of the seeds, and the interval covers the rows alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy import stats

LEAST_ROWS = 10
"""Rows that a metric has to count before a difference of it may be more than chance."""
_RESAMPLES = 1000
_FACTORS = [1.1**power for power in range(80)]  # up to 1900 times as many rows
_MOST_SEEDS = 100
_AT_ONCE = 100  # resamples that exist at the same time: `[resamples, rows]` counts


_Variance = tuple[float, int]
"""A variance, and its degrees of freedom."""
_Variances = list[_Variance]
"""Variances that add up."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, or a difference of two."""

    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    p: float
    """Probability of a value at least as far from 0 if the true value is 0 (two-sided)."""
    seeds_known: bool
    """Whether the interval covers other seeds as well as other rows."""
    of_rows: _Variance = (0.0, 0)
    """The part of the variance that the rows cause."""
    of_seeds: _Variances = field(default_factory=list)
    """The parts that the seeds cause."""
    interaction: float = 0.0
    """The variance that a row causes in one seed and not in another, which `of_rows` and `of_seeds` both contain."""
    counted: int = 0
    """Rows that the metric counts, on the side with fewer of them."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The statistics of one metric in the runs of a group."""

    statistics: np.ndarray
    """`[seeds, rows, numbers]` float64."""
    of_sums: Callable[[np.ndarray], np.ndarray]
    """`[..., numbers]` sums over rows to `[...]` values."""
    fixed: bool = False
    """Whether there is one model and no seed, as with a base model."""

    @property
    def values(self) -> np.ndarray:
        """The value of every seed: `[seeds]`."""
        return self.of_sums(self.statistics.sum(axis=1))

    @property
    def counted(self) -> np.ndarray:
        """Whether the metric counts a row in some run: `[rows]` bool."""
        return np.asarray(self.statistics.any(axis=(0, 2)))

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """Return the value of every seed for drawn rows: `[resamples, seeds]`; NaN if no drawn row counts the metric.

        Args:
            counts: `[resamples, rows]`, how often each row is drawn.
        """
        return self.of_sums(np.stack([counts @ of_seed for of_seed in self.statistics], axis=1))


@np.errstate(invalid="ignore")  # a diverged model has values that are not finite
def mean(sample: Sample, seed: int = 0) -> Estimate:
    """Return the mean of a metric over the seeds.

    Args:
        seed: Seed of the drawn rows.
    """
    drawn = np.concatenate([sample.resampled(counts) for counts in _draws(sample.statistics.shape[1], seed)])
    value = float(sample.values.mean())
    return _estimate(value, _over_seeds(drawn), _of_seeds(sample), int(sample.counted.sum()), _interaction(drawn))


@np.errstate(invalid="ignore")
def difference(sample: Sample, baseline: Sample, same_seeds: bool, seed: int = 0) -> Estimate:
    """Return the mean of a sample minus that of a baseline of the same rows.

    Both share the drawn rows, and are so paired by row.

    Args:
        same_seeds: Whether the runs of both have the same seeds in the same order, and are so paired by seed.
    """
    rows = min(int(sample.counted.sum()), int(baseline.counted.sum()))
    draws = _draws(sample.statistics.shape[1], seed)
    ours, theirs = (np.concatenate([one.resampled(counts) for counts in draws]) for one in (sample, baseline))
    drawn = _over_seeds(ours) - _over_seeds(theirs)
    value = float(sample.values.mean() - baseline.values.mean())
    if same_seeds:
        return _estimate(value, drawn, _of_values(sample.values - baseline.values), rows, _interaction(ours - theirs))
    return _estimate(value, drawn, _of_two(sample, baseline), rows, _interaction(ours) + _interaction(theirs))


def rows_needed(found: Estimate, rows: int, level: float, seeds_factor: float = 1.0) -> int | None:
    """Return about how many rows would show a difference as large as the one that was found.

    Args:
        rows: Rows that the difference was found with.
        level: Largest p that shows it.
        seeds_factor: How many times as many seeds there are.

    Returns:
        A number with two digits that count; None if the seeds differ too much for any number of rows, or are not known.
    """
    for factor in _FACTORS if found.of_seeds else ():
        if found.counted * factor >= LEAST_ROWS and _p_of_more(found, factor, seeds_factor) <= level:
            return _two_digits(rows * factor)
    return None


def seeds_needed(found: Estimate, seeds: int, level: float) -> int | None:
    """Return about how many seeds would show a difference as large as the one that was found, with the same rows.

    Args:
        seeds: Seeds that the difference was found with, paired.
        level: Largest p that shows it.

    Returns:
        None if the rows are too few for any number of seeds, or the seeds are not known.
    """
    enough = found.of_seeds and found.counted >= LEAST_ROWS
    for count in range(seeds, _MOST_SEEDS + 1) if enough else ():
        if _p_of_more(found, 1.0, count / seeds) <= level:
            return count
    return None


def rows_and_seeds_needed(found: Estimate, rows: int, seeds: int, level: float) -> tuple[int, int] | None:
    """Return about how many rows, together with how many more seeds, would show a difference as large as that found.

    Of the numbers of seeds, twice, four times and so on as many, it is the first that some number of rows goes with.
    None if none does, or the seeds are not known.
    """
    count = 2 * seeds
    while count <= _MOST_SEEDS:
        if (needed := rows_needed(found, rows, level, count / seeds)) is not None:
            return needed, count
        count *= 2
    return None


def _p_of_more(found: Estimate, rows_factor: float, seeds_factor: float) -> float:
    """Return p of the same difference, found with so many times as many rows and seeds."""
    variance, degrees = found.of_rows
    of_rows = max(0.0, variance - found.interaction) + found.interaction / seeds_factor
    more_rows = of_rows / rows_factor, round((degrees + 1) * rows_factor) - 1
    whole = sum(part for part, _ in found.of_seeds)
    share = min(1.0, found.interaction / whole) if whole else 0.0  # of the seeds' variance, which rows lower too
    kept = (1.0 - share + share / rows_factor) / seeds_factor
    more_seeds = [(part * kept, round((df + 1) * seeds_factor) - 1) for part, df in found.of_seeds]
    return _least_sure(found.value, more_rows, more_seeds)[1]


def _two_digits(value: float) -> int:
    size = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return math.ceil(value / size) * size


def holm(values: list[float]) -> list[float]:
    """Return p-values that are corrected for their number (Holm 1979): at most 5 % chance of any false finding."""
    order = np.argsort(values)
    corrected, largest = np.ones(len(values)), 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[number]))
        corrected[number] = largest
    return corrected.tolist()


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of a share of independent rows (Wilson 1927)."""
    z = 1.96
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


@lru_cache(maxsize=1)  # all metrics and groups share the draws of their rows
def _draws(rows: int, seed: int) -> list[np.ndarray]:
    """Return how often each row is drawn in every resample, in parts: `[resamples, rows]` float32."""
    rng = np.random.default_rng([20260101, seed])
    shares = np.full(rows, 1.0 / rows)
    return [rng.multinomial(rows, shares, size=_AT_ONCE).astype(np.float32) for _ in range(_RESAMPLES // _AT_ONCE)]


def _of_values(values: np.ndarray) -> _Variances | None:
    """Return the variance of a mean over seeds; None without a second seed."""
    return [(float(values.var(ddof=1)) / len(values), len(values) - 1)] if len(values) > 1 else None


def _over_seeds(drawn: np.ndarray) -> np.ndarray:
    """Return the mean over the seeds: `[resamples, seeds]` to `[resamples]`."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # no drawn row may count the metric
        return np.nanmean(drawn, axis=1)


def _interaction(drawn: np.ndarray) -> float:
    """Return the variance of a mean over seeds that a row causes in one seed and not in another.

    Args:
        drawn: `[resamples, seeds]`, the value of every seed in every resample of the rows.
    """
    seeds = drawn.shape[1]
    if seeds < 2:
        return 0.0
    centred = drawn - _over_seeds(drawn)[:, None]
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        return float(np.nanvar(centred, axis=0, ddof=1).mean() / (seeds - 1))


def _of_seeds(sample: Sample) -> _Variances | None:
    """Return the variance of a sample's mean that its seeds cause; None if it is not known."""
    return [] if sample.fixed else _of_values(sample.values)


def _of_two(sample: Sample, baseline: Sample) -> _Variances | None:
    """Return the variances of a difference that the seeds cause; None if they are not known.

    A single seed is taken to vary as those of the other side do, so that their variance counts for both.
    """
    ours, theirs = _of_seeds(sample), _of_seeds(baseline)
    if ours is not None and theirs is not None:
        return ours + theirs
    known = ours or theirs
    return [(known[0][0] * (known[0][1] + 2), known[0][1])] if known else None


def _estimate(value: float, drawn: np.ndarray, of_seeds: _Variances | None, rows: int, interaction: float) -> Estimate:
    """Return an estimate.

    Args:
        drawn: The value in every resample of the rows.
        of_seeds: The variances that the seeds cause; None if they are not known.
        rows: Rows that the metric counts.
        interaction: The variance of `_interaction`.
    """
    if not math.isfinite(value):
        return Estimate(value=value, low=math.nan, high=math.nan, p=1.0, seeds_known=of_seeds is not None)
    of_rows = (float(np.nanvar(drawn, ddof=1)), rows - 1)
    half, p = _least_sure(value, of_rows, of_seeds or [])
    if half == 0 and value != 0:
        p = 2.0 ** (1 - max(1, rows))  # all rows agree; if the truth were 0, their signs would by chance alone
    p = 1.0 if rows < LEAST_ROWS else p
    return Estimate(
        value=value,
        low=value - half,
        high=value + half,
        p=p,
        seeds_known=of_seeds is not None,
        of_rows=of_rows,
        of_seeds=of_seeds or [],
        interaction=interaction,
        counted=rows,
    )


def _least_sure(value: float, of_rows: _Variance, of_seeds: _Variances) -> tuple[float, float]:
    """Return half the width of the 95 % interval of a value, and its p: of rows and seeds, or of the seeds alone."""
    tests = [_student(value, parts) for parts in ([of_rows, *of_seeds], of_seeds)]
    return max(half for half, _ in tests), max(p for _, p in tests)


def _student(value: float, variances: _Variances) -> tuple[float, float]:
    """Return half the width of the 95 % interval of a value, and its p, by Student's t."""
    parts = [(variance, degrees) for variance, degrees in variances if variance > 0 and degrees > 0]
    if not parts:
        return 0.0, float(value == 0)
    variance = sum(part for part, _ in parts)
    degrees_of_freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stats.t.ppf(0.975, degrees_of_freedom)) * math.sqrt(variance)
    return half, 2 * float(stats.t.sf(abs(value) / math.sqrt(variance), degrees_of_freedom))
