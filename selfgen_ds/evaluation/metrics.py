"""The metrics of an evaluation: their meanings, their values for one row, and their values over all rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

METRICS = {
    "loss": "mean negative log-likelihood per response token, given the reference before the token",
    "exact_match": "share of greedy answers with the text of the reference",
    "teacher_forced_accuracy": "most probable token is right, given the reference before it",
    "free_running_accuracy": "token of the greedy answer equals the reference's token at the same position",
}
RECOVERY_METRICS = {
    "recovery_1": "after one forced wrong token: the next greedy token is right",
    "recovery_4": "after one forced wrong token: share of the next 4 tokens that are right",
    "recovery_last": "after one forced wrong token: the last token of the answer is right",
}
SAMPLED_METRICS = {
    "sampled_exact_match": "exact match of answers sampled at the given temperature",
    "sampled_accuracy": "token of the sampled answer equals the reference's token at the same position",
}
CORRECTION_METRICS = {
    "exact_match": "share of answers with the text of the reference after this correction",
    "wrong_to_right": "share of all answers that this correction made right",
    "right_to_wrong": "share of all answers that this correction made wrong",
    "unchanged": "share of all answers whose text this correction did not change",
}


def corrected(number: int) -> dict[str, str]:
    """Map each of `CORRECTION_METRICS` to the name of the metric after correction `number` (from 1)."""
    return {name: f"corrected_{number}_{name}" for name in CORRECTION_METRICS}


def descriptions(correction_rounds: int) -> dict[str, str]:
    """Map the name of every metric that an evaluation may have to what the metric means."""
    described = METRICS | RECOVERY_METRICS | SAMPLED_METRICS
    for number in range(1, correction_rounds + 1):
        described |= {name: CORRECTION_METRICS[kind] for kind, name in corrected(number).items()}
    return described


@dataclass(frozen=True, kw_only=True)
class SampleScore:
    """The scores of one row: the model's answers, and which tokens of the reference they got right.

    The reference is the row's response; in a conversation, the last turn.
    """

    sample_id: int
    prompt: str
    reference: str
    answer: str
    """The greedy answer."""
    negative_log_likelihood: float
    """Sum over all target tokens, in nats; in a conversation, over the tokens of every learned turn."""
    tokens: int
    """Number of target tokens."""
    teacher_forced: list[bool]
    """One entry per reference token: whether the most probable token, given the reference before it, is right."""
    free_running: list[bool]
    """One entry per reference token: whether `answer` has that token there."""
    unfinished: bool = False
    """Whether `answer` was cut before the model ended it."""
    recovery: list[bool] | None = None
    """One entry per token that is right after a forced error: whether the greedy continuation has that token there.
    None unless the row belongs to a built-in task."""
    sampled: list[bool] | None = None
    """One entry per reference token: whether `sampled_answer` has that token there; None if no answers were sampled."""
    sampled_answer: str | None = None
    corrected_answers: list[str] | None = None
    """Answers after 1, 2, ... corrections of `answer`; None if no corrections were asked for."""

    def metrics(self) -> dict[str, float]:
        """Return the value of every metric for this row."""
        values = {
            "loss": self.negative_log_likelihood / self.tokens,
            "exact_match": float(self.answer == self.reference),
            "teacher_forced_accuracy": float(np.mean(self.teacher_forced)),
            "free_running_accuracy": float(np.mean(self.free_running)),
        }
        if self.recovery is not None:
            values |= {
                "recovery_1": float(self.recovery[0]),
                "recovery_4": float(np.mean(self.recovery[:4])),
                "recovery_last": float(self.recovery[-2]),  # the token before the end token
            }
        if self.sampled is not None:
            values |= {
                "sampled_exact_match": float(self.sampled_answer == self.reference),
                "sampled_accuracy": float(np.mean(self.sampled)),
            }
        answers = [self.answer, *(self.corrected_answers or [])]
        for number, (before, after) in enumerate(pairwise(answers), start=1):
            was_right, is_right = before == self.reference, after == self.reference
            flags = (is_right, is_right and not was_right, was_right and not is_right, after == before)
            values |= {name: float(flag) for name, flag in zip(corrected(number).values(), flags, strict=True)}
        return values


def aggregate(scores: list[SampleScore]) -> dict[str, float]:
    """Return every metric over all rows: the mean per token for `loss`, the mean per row for the rest."""
    rows = [score.metrics() for score in scores]
    metrics = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    tokens = sum(score.tokens for score in scores)
    return metrics | {"loss": sum(score.negative_log_likelihood for score in scores) / tokens}


def curves(scores: list[SampleScore]) -> dict[str, list[float]]:
    """Return the accuracy at each position of the answer, over the rows that reach the position.

    The curve `recovery` starts after the forced error and ends before the end token. A curve that a row lacks is
    left out.
    """
    result = {}
    for name, rows in _by_position(scores).items():
        longest = max(map(len, rows))
        result[name] = [float(np.mean([row[i] for row in rows if len(row) > i])) for i in range(longest)]
    return result


def binned_curves(scores: list[SampleScore]) -> dict[str, Curve]:
    """Return the curves in bins, with intervals."""
    return {name: binned(rows) for name, rows in _by_position(scores).items()}


def _by_position(scores: list[SampleScore]) -> dict[str, list[list[bool]]]:
    """Return, by the name of a curve, whether the token at each position of each row is right."""
    result = {}
    for name in ("teacher_forced", "free_running", "recovery"):
        rows = [getattr(score, name) for score in scores]
        if None not in rows:
            result[name] = [row[:-1] for row in rows] if name == "recovery" else rows
    return result


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracy by position, in bins of neighbouring positions; one entry per bin."""

    positions: list[float]
    """Mean position of the tokens in the bin, from 1."""
    mean: list[float]
    low: list[float]
    """Lower end of the 95 % interval of the bin's mean (Wilson 1927), as if the tokens were independent."""
    high: list[float]


def binned(rows: list[list[bool]], bins: int = 20, least: int = 30) -> Curve:
    """Return the accuracy by position over some rows, as far as they reach.

    Args:
        rows: Per row and position, whether the token there is right.
        bins: Most bins.
        least: Fewest tokens of a bin; the last bin takes the rest, and may be the only one.
    """
    longest = max(map(len, rows))
    right, tokens = np.zeros(longest), np.zeros(longest)
    for row in rows:
        right[: len(row)] += row
        tokens[: len(row)] += 1
    width, starts, counted = -(-longest // bins), [0], 0.0
    for position in range(longest):
        if position - starts[-1] >= width and counted >= least and tokens[position:].sum() >= least:
            starts.append(position)
            counted = 0.0
        counted += tokens[position]
    n, k = (np.add.reduceat(counts, starts) for counts in (tokens, right))
    at = np.add.reduceat(tokens * np.arange(1, longest + 1), starts) / n
    share, z = k / n, 1.96
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Curve(
        positions=at.tolist(), mean=share.tolist(), low=(centre - half).tolist(), high=(centre + half).tolist()
    )
