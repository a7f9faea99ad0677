"""Accuracy and log-likelihood by position in the answer, and by the share of the model's own errors before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from selfgen_ds.evaluation.metrics import SampleScore

ERROR_SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Upper ends of the groups of `accuracy_by_errors`: no error so far, at most a tenth of the tokens, and so on."""
_PARTS = 4


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A mean by position, in bins of neighbouring positions; one entry per bin."""

    positions: list[float]
    """Mean position of the tokens in the bin, from 1."""
    mean: list[float]
    low: list[float]
    """Lower end of the 95 % interval of the bin's mean."""
    high: list[float]


class PositionSums:
    """A number at every position of some rows, summed over the rows as far as each of them reaches.

    Args:
        flags: Whether the numbers are flags, whose means are shares.
    """

    def __init__(self, flags: bool) -> None:
        self._flags = flags
        self._sums = np.zeros((3, 0))  # tokens, numbers, and their squares, by position

    def add(self, row: Sequence[float]) -> None:
        """Add the numbers of a row."""
        values = np.array(row, dtype=np.float64)
        self._add(np.stack([np.ones_like(values), values, values**2]))

    def __add__(self, other: PositionSums) -> PositionSums:
        both = PositionSums(self._flags)
        both._add(self._sums)
        both._add(other._sums)
        return both

    def _add(self, sums: np.ndarray) -> None:
        """Add `[3, positions]` sums."""
        missing = sums.shape[1] - self._sums.shape[1]
        self._sums = np.pad(self._sums, ((0, 0), (0, max(0, missing))))
        self._sums[:, : sums.shape[1]] += sums

    def means(self) -> list[float]:
        """Return the mean at every position over the rows that reach it."""
        return (self._sums[1] / self._sums[0]).tolist()

    def binned(self, bins: int = 20, least: int = 30) -> Curve:
        """Return the mean by position, in bins.

        The intervals take the tokens as independent: Wilson 1927 for flags, the normal interval of a mean for numbers.

        Args:
            bins: Most bins.
            least: Fewest tokens of a bin; the last bin takes the rest, and may be the only one.
        """
        tokens = self._sums[0]
        longest = len(tokens)
        width, starts, counted = -(-longest // bins), [0], 0.0
        for position in range(longest):
            if position - starts[-1] >= width and counted >= least and tokens[position:].sum() >= least:
                starts.append(position)
                counted = 0.0
            counted += tokens[position]
        n, sums, squares = (np.add.reduceat(counts, starts) for counts in self._sums)
        at = np.add.reduceat(tokens * np.arange(1, longest + 1), starts) / n
        mean, z = sums / n, 1.96
        if self._flags:
            centre = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
            half = z / (1 + z**2 / n) * np.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
        else:
            centre, half = mean, z * np.sqrt(np.maximum(squares / n - mean**2, 0.0) / n)
        low, high = (centre - half).tolist(), (centre + half).tolist()
        return Curve(positions=at.tolist(), mean=mean.tolist(), low=low, high=high)


ACCURACIES = ("teacher_forced", "free_running", "recovery")
"""Curves of the share of right tokens; `recovery` starts after the forced error."""
LOG_LIKELIHOODS = ("teacher_forced_log_likelihood", "free_running_log_likelihood")
"""Curves of the log-probability of the reference's token in nats, given the reference or the own answer before it."""
_DIVERGENCES = ("own_divergence", "reference_divergence")


class Curves:
    """What some rows say by position. A curve that no row has is left out."""

    def __init__(self, scores: Iterable[SampleScore] = ()) -> None:
        self.by_name: dict[str, PositionSums] = {}
        for score in scores:
            self.add(score)

    def add(self, score: SampleScore) -> None:
        """Add a row."""
        self._add("teacher_forced", score.teacher_forced)
        self._add("free_running", score.free_running)
        for flags in score.recovery:
            self._add("recovery", flags)
        for name, row in zip(LOG_LIKELIHOODS, (score.log_likelihoods, score.own_log_likelihoods), strict=True):
            self._add(name, row)
        for name, row in zip(_DIVERGENCES if score.divergences else (), score.divergences, strict=True):
            self._add(name, row)

    def _add(self, name: str, row: Sequence[float]) -> None:
        self.by_name.setdefault(name, PositionSums(flags=name in ACCURACIES)).add(row)

    def __add__(self, other: Curves) -> Curves:
        both = Curves()
        both.by_name = dict(self.by_name)
        for name, sums in other.by_name.items():
            both.by_name[name] = both.by_name[name] + sums if name in both.by_name else sums
        return both

    def excess_error(self) -> list[float]:
        """Return ExAccErr up to every position, in percent (`selfgen_ds.evaluation.excess_error`).

        Returns:
            An empty list without an oracle, or if the oracle is the model itself.
        """
        if _DIVERGENCES[0] not in self.by_name:
            return []
        own, reference = (np.cumsum(self.by_name[name].means()) for name in _DIVERGENCES)
        return (100 * (own / reference - 1)).tolist() if (reference > 0).all() else []

    def to_json(self) -> dict[str, list[float]]:
        """Return the mean of every curve at every position."""
        means = {n: self.by_name[n].means() for n in (*ACCURACIES, *LOG_LIKELIHOODS) if n in self.by_name}
        return means | ({"excess_error": excess} if (excess := self.excess_error()) else {})


def accuracy_by_errors(scores: list[SampleScore]) -> list[dict[str, float]]:
    """Return the accuracy of the greedy answers' tokens by their place and by the share of errors before them.

    An error is a token unlike the reference's at the same position. Sinha et al. 2025 (arXiv 2509.09677) ask how errors
    in the model's own context change its accuracy at a later step. To tell this from the effect of the place alone,
    tokens of the four quarters of the positions are kept apart.

    Returns:
        For every quarter and group of error shares that has tokens: `from_position`, `to_position` (from 1),
        `most_errors` (the largest share of errors before the token), `tokens` and `accuracy`.
    """
    longest = max(len(score.free_running) for score in scores)
    counts: dict[tuple[int, int], list[int]] = {}
    for score in scores:
        wrong = 0
        reached = len(score.own_log_likelihoods) - score.unfinished  # what the answer does not have is no error in it
        for position, right in enumerate(score.free_running[:reached]):
            share = wrong / position if position else 0.0
            group = next(i for i, most in enumerate(ERROR_SHARES) if share <= most)
            count = counts.setdefault((position * _PARTS // longest, group), [0, 0])
            count[0] += 1
            count[1] += right
            wrong += not right
    return [
        {
            "from_position": -(-part * longest // _PARTS) + 1,
            "to_position": -(-(part + 1) * longest // _PARTS),
            "most_errors": ERROR_SHARES[group],
            "tokens": tokens,
            "accuracy": right / tokens,
        }
        for (part, group), (tokens, right) in sorted(counts.items())
    ]
