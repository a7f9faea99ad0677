"""Accuracy and log-likelihood by position in the answer, and by the share of the model's own errors before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfgen_ds.evaluation.metrics import SampleScore

ERROR_SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Upper ends of the groups of `accuracy_by_errors`: no error so far, at most a tenth of the tokens, and so on."""
_PARTS = 4


def curves(scores: list[SampleScore]) -> dict[str, Any]:
    """Return what an evaluation says by position: means over the rows that reach a position.

    Accuracies are `teacher_forced`, `free_running` and `recovery`, which starts after the forced error. The mean
    log-probabilities of the reference's tokens in nats are `teacher_forced_log_likelihood` (given the reference before
    them) and `free_running_log_likelihood` (given the model's own answer before them). A curve that no row has is left
    out.
    """
    found: dict[str, Any] = {}
    for named in (accuracies(scores), log_likelihoods(scores)):
        for name, rows in named.items():
            found[name] = [float(np.mean(values)) for values in _columns(rows)]
    return found | {"accuracy_by_errors": accuracy_by_errors(scores)}


def accuracies(scores: list[SampleScore]) -> dict[str, list[list[bool]]]:
    """Return, by the name of a curve, whether the token at each position of each row is right."""
    named = {
        "teacher_forced": [score.teacher_forced for score in scores],
        "free_running": [score.free_running for score in scores],
        "recovery": [flags for score in scores for flags in score.recovery],
    }
    return {name: rows for name, rows in named.items() if rows}


def log_likelihoods(scores: list[SampleScore]) -> dict[str, list[list[float]]]:
    """Return, by the name of a curve, the log-probability of the reference's token at each position of each row."""
    return {
        "teacher_forced_log_likelihood": [score.log_likelihoods for score in scores],
        "free_running_log_likelihood": [score.own_log_likelihoods for score in scores],
    }


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


def _columns(rows: Sequence[Sequence[float]]) -> Iterator[list[float]]:
    """Yield the values of the rows that reach a position, position by position."""
    for position in range(max(map(len, rows))):
        yield [row[position] for row in rows if len(row) > position]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A mean by position, in bins of neighbouring positions; one entry per bin."""

    positions: list[float]
    """Mean position of the tokens in the bin, from 1."""
    mean: list[float]
    low: list[float]
    """Lower end of the 95 % interval of the bin's mean."""
    high: list[float]


def binned(rows: Sequence[Sequence[float]], bins: int = 20, least: int = 30) -> Curve:
    """Return the mean by position over some rows, as far as they reach.

    The intervals take the tokens as independent: Wilson 1927 for flags, the normal interval of a mean for numbers.

    Args:
        rows: Per row and position, a number, or whether the token there is right.
        bins: Most bins.
        least: Fewest tokens of a bin; the last bin takes the rest, and may be the only one.
    """
    longest = max(map(len, rows))
    tokens, total, squares = np.zeros(longest), np.zeros(longest), np.zeros(longest)
    for row in rows:
        values = np.array(row, dtype=np.float64)
        tokens[: len(row)] += 1
        total[: len(row)] += values
        squares[: len(row)] += values**2
    width, starts, counted = -(-longest // bins), [0], 0.0
    for position in range(longest):
        if position - starts[-1] >= width and counted >= least and tokens[position:].sum() >= least:
            starts.append(position)
            counted = 0.0
        counted += tokens[position]
    n, sums, sums_of_squares = (np.add.reduceat(counts, starts) for counts in (tokens, total, squares))
    at = np.add.reduceat(tokens * np.arange(1, longest + 1), starts) / n
    mean, z = sums / n, 1.96
    if all(isinstance(value, bool) for row in rows for value in row):
        centre = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    else:
        centre, half = mean, z * np.sqrt(np.maximum(sums_of_squares / n - mean**2, 0.0) / n)
    return Curve(positions=at.tolist(), mean=mean.tolist(), low=(centre - half).tolist(), high=(centre + half).tolist())
