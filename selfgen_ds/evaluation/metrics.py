"""The metrics of an evaluation: what each of them means, and its value from sums over rows.

A metric's name may have a prefix that says which answers it is of: none for the greedy answers, or one of
`ANSWER_KINDS`, such as `sampled_1.5_rouge_l`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from selfgen_ds.evaluation.text_metrics import Statistics, corpus_score

Sums = np.ndarray
"""`[..., numbers]`: the statistics of a metric, summed over rows."""
CALIBRATION_BINS = 15


def _ratio(sums: Sums) -> np.ndarray:
    """Return the first number divided by the second; NaN where nothing was counted."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def _calibration_error(sums: Sums) -> np.ndarray:
    """Return the expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

    Args:
        sums: Per bin of equal width, the tokens, the sum of the probabilities of the most probable token, and how often
            this token is right.
    """
    tokens, confidence, right = np.moveaxis(sums.reshape(*sums.shape[:-1], CALIBRATION_BINS, 3), -1, 0)
    return np.abs(confidence - right).sum(axis=-1) / tokens.sum(axis=-1)


def _by_sacrebleu(name: str) -> Callable[[Sums], np.ndarray]:
    """Return a function that computes sacrebleu's score from its own counts."""

    def of_one(sums: np.ndarray) -> float:
        return corpus_score(name)._compute_score_from_stats([int(number) for number in sums]).score

    return lambda sums: np.apply_along_axis(of_one, -1, sums)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric means, and how it is computed from sums over rows."""

    meaning: str
    better: Literal["higher", "lower", ""] = "higher"
    """Which values are better; empty if neither is."""
    least: float | None = 0.0
    """The smallest value; None if there is none."""
    scale: float = 1.0
    """The largest value that a plot has to show; 0 if there is none."""
    of_sums: Callable[[Sums], np.ndarray] = _ratio
    """`[..., numbers]` to `[...]`."""


METRICS = {
    "loss": Metric(
        meaning="mean negative log-likelihood per response token, given the reference before the token",
        better="lower",
        scale=0,
    ),
    "exact_match": Metric(meaning="share of answers with the text of the reference"),
    "normalized_match": Metric(meaning="the same without case, punctuation, articles and white space"),
    "final_answer": Metric(meaning="share of answers that come to the reference's number, `####` or boxed answer"),
    "teacher_forced_accuracy": Metric(meaning="most probable token is right, given the reference before it"),
    "free_running_accuracy": Metric(meaning="token of the answer equals the reference's token at the same position"),
    "accuracy": Metric(meaning="token of the answer equals the reference's token at the same position"),
    "last_token": Metric(meaning="the reference's last token stands in the answer at the same position"),
    "free_running_loss": Metric(
        meaning="mean negative log-likelihood of the reference's tokens, given the model's own answer before them",
        better="lower",
        scale=0,
    ),
    "rouge_1": Metric(meaning="ROUGE-1, F-measure: words in common with the reference"),
    "rouge_2": Metric(meaning="ROUGE-2, F-measure: pairs of words in common"),
    "rouge_l": Metric(meaning="ROUGE-L, F-measure: longest common subsequence of words"),
    "bleu": Metric(meaning="BLEU of all answers together, 0 to 100", scale=100, of_sums=_by_sacrebleu("bleu")),
    "chrf": Metric(meaning="chrF2 of all answers together, 0 to 100", scale=100, of_sums=_by_sacrebleu("chrf")),
    "ter": Metric(
        meaning="edits per 100 words of the references (TER)",
        better="lower",
        scale=100,
        of_sums=lambda s: 100 * _ratio(s),
    ),
    "embedding_distance": Metric(
        meaning="1 - cosine of the sentence embeddings of answer and reference", better="lower", scale=2
    ),
    "win_rate": Metric(meaning="share of pairs in which a judge prefers the answer to another one; a tie counts half"),
    "repetition": Metric(meaning="share of the answers' 4-grams of words that occurred before", better="lower"),
    "length_ratio": Metric(meaning="characters of the answers per character of the references", better="", scale=0),
    "calibration_error": Metric(
        meaning="expected calibration error of the most probable token, given the reference before it",
        better="lower",
        of_sums=_calibration_error,
    ),
    "entropy": Metric(
        meaning="mean entropy of the next token in nats, given the reference before it", better="", scale=0
    ),
    "excess_error": Metric(
        meaning="divergence from an oracle after own tokens, beyond that after the reference's (ExAccErr, percent)",
        better="lower",
        least=None,
        scale=0,
        of_sums=lambda s: 100 * (_ratio(s) - 1),
    ),
    "recovery_1": Metric(meaning="after a forced wrong token: the next greedy token is right"),
    "recovery_4": Metric(meaning="after a forced wrong token: share of the next 4 tokens that are right"),
    "recovery_last": Metric(meaning="after a forced wrong token: the last token of the answer is right"),
    "recovery_loss": Metric(
        meaning="loss of the reference's tokens after a forced wrong token, given the reference between",
        better="lower",
        scale=0,
    ),
    "recovery_final_answer": Metric(meaning="after a forced wrong token: the final answer is right"),
    "slips": Metric(meaning="share of answers with a token unlike the reference's before the last 4", better="lower"),
    "after_slip_1": Metric(meaning="after the answer's first slip: the next token is right"),
    "after_slip_4": Metric(meaning="after the answer's first slip: share of the next 4 tokens that are right"),
    "after_slip_last": Metric(meaning="after the answer's first slip: the last token is right"),
    "after_slip_final_answer": Metric(meaning="answers with a slip whose final answer is right"),
    "wrong_to_right": Metric(meaning="share of all answers that this correction made right"),
    "right_to_wrong": Metric(meaning="share of all answers that this correction made wrong", better="lower"),
    "unchanged": Metric(meaning="share of all answers whose text this correction did not change", better=""),
}
IN_TRAINING = (
    *("loss", "exact_match", "normalized_match", "final_answer", "teacher_forced_accuracy", "free_running_accuracy"),
    *("rouge_1", "rouge_2", "rouge_l", "bleu", "chrf"),
)
"""Metrics that can tell which checkpoint is the best: all of `loss` the lowest, of the others the highest."""
RECOVERY = ("recovery_1", "recovery_4", "recovery_last")
"""The same for built-in tasks, whose rows have a forced error in training too."""
ANSWER_KINDS = {
    r"sampled_[0-9.e+-]+": "answers sampled at this temperature",
    r"corrected_\d+": "answers after this correction",
    r"prefix_[0-9.]+": "answers that continue this share of the reference",
    r"noise_[0-9.e+-]+": "weights with normal noise of this share of each tensor's standard deviation",
    r"int[48]": "weights rounded to integers of so many bits",
}
_KIND = re.compile(rf"(?:({'|'.join(ANSWER_KINDS)})_)?(.+)")
_PASS = re.compile(r"pass_(\d+)")


def kind_and_metric(name: str) -> tuple[str, str]:
    """Return the prefix of a metric's name, without its underscore, and the name without the prefix."""
    found = _KIND.fullmatch(name)
    assert found is not None
    return found[1] or "", found[2]


def metric_of(name: str) -> Metric:
    """Return the metric that a name stands for, with or without a prefix; a name of the user's own is a mean."""
    _, base = kind_and_metric(name)
    if passes := _PASS.fullmatch(base):
        return Metric(meaning=f"at least one of {passes[1]} sampled answers is right (pass@k, unbiased)")
    return METRICS.get(base) or Metric(meaning="the metric of your own", least=None, scale=0)


def is_taken(name: str) -> bool:
    """Return whether a name is that of a metric, with or without a prefix."""
    _, base = kind_and_metric(name)
    return base in METRICS or _PASS.fullmatch(base) is not None


def meaning(name: str) -> str:
    """Return what a metric means, and of which answers it is."""
    kind, _ = kind_and_metric(name)
    of = next((f"{text}: " for pattern, text in ANSWER_KINDS.items() if re.fullmatch(pattern, kind)), "")
    return of + metric_of(name).meaning


def value(name: str, sums: Sums) -> np.ndarray:
    """Return a metric's value: `[..., numbers]` sums to `[...]`."""
    return metric_of(name).of_sums(np.asarray(sums, dtype=np.float64))


def values(rows: Iterable[Statistics]) -> dict[str, float]:
    """Return the value of every metric over some rows; a metric that no row counts is left out."""
    sums: dict[str, np.ndarray] = {}
    for row in rows:
        for name, numbers in row.items():
            sums[name] = sums.get(name, 0.0) + np.array(numbers)
    return {name: float(value(name, numbers)) for name, numbers in sums.items() if numbers.any()}


@dataclass(frozen=True, kw_only=True)
class SampleScore:
    """The scores of one row: the model's answers, and the statistics of every metric.

    The reference is the row's response; in a conversation, the last turn.
    """

    sample_id: int
    prompt: str
    reference: str
    answer: str
    """The greedy answer."""
    teacher_forced: list[bool]
    """One entry per reference token: whether the most probable token, given the reference before it, is right."""
    free_running: list[bool]
    """One entry per reference token: whether `answer` has that token there."""
    log_likelihoods: list[float]
    """One entry per reference token: its log-probability in nats, given the reference before it."""
    own_log_likelihoods: list[float]
    """One entry per reference token up to the answer's length plus one: its log-probability in nats, given the greedy
    answer before it."""
    statistics: Statistics
    unfinished: bool = False
    """Whether `answer` was cut before the model ended it."""
    recovery: list[list[bool]] = field(default_factory=list)
    """Per forced error, one entry per token that is right after it and does not close the answer: whether the greedy
    continuation has that token there."""
    divergences: list[list[float]] = field(default_factory=list)
    """With an oracle, its divergence from the model by position in nats: after the model's own tokens, and after the
    reference's, as far as both go."""
    other_answers: dict[str, list[str]] = field(default_factory=dict)
    """Kind of answers (`ANSWER_KINDS`) -> the answers."""

    def metrics(self) -> dict[str, float]:
        """Return the value of every metric for this row."""
        return values([self.statistics])


def aggregate(scores: list[SampleScore]) -> dict[str, float]:
    """Return every metric over all rows."""
    return values(score.statistics for score in scores)
