"""From the answers to a row to its scores: texts, and the statistics of every metric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from selfgen_ds.evaluation.answers import RowAnswers
from selfgen_ds.evaluation.final_answers import final_answer, same_final_answer
from selfgen_ds.evaluation.metrics import CALIBRATION_BINS, SampleScore
from selfgen_ds.evaluation.recovery import content_length, recovery_statistics, slip_statistics
from selfgen_ds.evaluation.text_metrics import Statistics, TextMetrics
from selfgen_ds.model.head import Prediction


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """The texts of one row's answers of one kind."""

    row: int
    kind: str
    """As `selfgen_ds.evaluation.metrics.ANSWER_KINDS`; empty for the greedy answer."""
    answers: list[str]
    reference: str


def score_rows(
    rows: Sequence[RowAnswers], tokenizer: PreTrainedTokenizerBase, text: TextMetrics, end_tokens: Sequence[int]
) -> list[SampleScore]:
    """Return the scores of some rows.

    Args:
        end_tokens: Tokens that end an answer.

    Raises:
        InputError: The metric of the user's own raises.
    """
    prompts = [_decode(tokenizer, row.sample.prompt_ids) for row in rows]
    texts = [told for i, row in enumerate(rows) for told in _texts(i, row, tokenizer)]
    statistics = [_token_statistics(row) for row in rows]
    flat = [(prompts[t.row], answer, t.reference) for t in texts for answer in t.answers]
    of_answers = iter(text.statistics(*zip(*flat, strict=True)) if flat else [])
    for told in texts:
        for _ in told.answers:
            _add(statistics[told.row], told.kind, next(of_answers))
    greedy = {told.row: told for told in texts if not told.kind}
    for told in texts:
        if told.kind.startswith("sampled_"):
            _add(statistics[told.row], told.kind, _sampled_statistics(rows[told.row], told))
    for i, row in enumerate(rows):
        corrections = [told for told in texts if told.row == i and told.kind.startswith("corrected_")]
        for before, after in pairwise([greedy[i], *corrections]):
            _add(statistics[i], after.kind, _change(before.answers[0], after.answers[0], after.reference))
        _add(statistics[i], "", _recovery(row, tokenizer, greedy[i].reference))
        if row.divergences:
            statistics[i]["excess_error"] = [sum(values) for values in row.divergences]
    return [
        SampleScore(
            sample_id=row.sample.sample_id,
            prompt=prompts[i],
            reference=greedy[i].reference,
            answer=greedy[i].answers[0],
            teacher_forced=_teacher_forced(row),
            free_running=right_tokens(row.answer, row.sample.response_ids.tolist()),
            log_likelihoods=_rounded(row.prediction.log_probability[-len(row.sample.response_ids) :].tolist()),
            own_log_likelihoods=_rounded(row.after_own.log_probability.tolist()),
            statistics=statistics[i],
            unfinished=not row.answer or row.answer[-1] not in end_tokens,
            recovery=[
                right_tokens(answer, error.rest_ids[: len(error.rest_ids) - error.closing])
                for error, answer, _ in row.forced
            ],
            divergences=row.divergences,
            other_answers={told.kind: told.answers for told in texts if told.row == i and told.kind},
        )
        for i, row in enumerate(rows)
    ]


def right_tokens(answer: list[int], reference: list[int]) -> list[bool]:
    """Return, per token of the reference, whether the answer has the token at the same position."""
    return [i < len(answer) and answer[i] == token for i, token in enumerate(reference)]


def is_right(answer: str, reference: str) -> bool:
    """Return whether an answer is right: its final answer, if the reference has one, or else its whole text."""
    expected = final_answer(reference)
    return answer == reference if expected is None else same_final_answer(answer, expected)


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Return the unbiased estimate of the probability that at least one of k answers is right.

    1 - C(answers - right, k) / C(answers, k) (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def _texts(number: int, row: RowAnswers, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Texts]:
    """Yield the texts of a row's answers, the greedy answer first."""
    response = row.sample.response_ids
    reference = _decode(tokenizer, response)
    kinds: dict[str, list[list[int]]] = {"": [row.answer]}
    kinds |= {f"sampled_{temperature:g}": answers for temperature, answers in row.sampled.items()}
    kinds |= {f"corrected_{round_}": [answer] for round_, answer in enumerate(row.corrected, start=1)}
    for kind, answers in kinds.items():
        yield _Texts(row=number, kind=kind, answers=[_decode(tokenizer, a) for a in answers], reference=reference)
    for share, (given, answer) in row.continued.items():
        rest = _decode(tokenizer, response[given:])
        yield _Texts(row=number, kind=f"prefix_{share:g}", answers=[_decode(tokenizer, answer)], reference=rest)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def _add(row: Statistics, kind: str, statistics: Statistics) -> None:
    """Add statistics of some answers to those of the row, under the names of their kind."""
    for name, numbers in statistics.items():
        full = f"{kind}_{name}" if kind else name
        row[full] = [a + b for a, b in zip(row.get(full, [0.0] * len(numbers)), numbers, strict=True)]


def _teacher_forced(row: RowAnswers) -> list[bool]:
    reference = row.sample.response_ids.tolist()
    return right_tokens(row.prediction.best[-len(reference) :].tolist(), reference)


def _token_statistics(row: RowAnswers) -> Statistics:
    """Return the statistics that depend on tokens alone."""
    log_probability, own = row.prediction.log_probability, row.after_own.log_probability
    targets = row.sample.target_ids[row.sample.loss_mask].tolist()
    free = right_tokens(row.answer, row.sample.response_ids.tolist())
    last = content_length(row.sample) - 1
    return {
        "loss": [-float(log_probability.sum()), float(len(log_probability))],
        "teacher_forced_accuracy": [float(np.mean(_teacher_forced(row))), 1.0],
        "free_running_accuracy": [float(np.mean(free)), 1.0],
        "last_token": [0.0, 0.0] if last < 0 else [float(free[last]), 1.0],
        "free_running_loss": [-float(own.sum()), float(len(own))],
        "entropy": [float(row.prediction.entropy.sum()), float(len(log_probability))],
        "calibration_error": calibration_counts(row.prediction, targets),
    }


def calibration_counts(prediction: Prediction, targets: list[int]) -> list[float]:
    """Return, per bin of confidence: tokens, their summed confidence, and how many of them are right."""
    confidence = prediction.confidence.double().numpy()
    if np.isnan(confidence).any():
        return [math.nan] * (3 * CALIBRATION_BINS)
    right = np.array(prediction.best.tolist()) == np.array(targets)
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = [np.bincount(bins, weights, CALIBRATION_BINS) for weights in (None, confidence, right.astype(float))]
    return np.stack(counts, axis=1, dtype=np.float64).ravel().tolist()


def _sampled_statistics(row: RowAnswers, told: _Texts) -> Statistics:
    """Return the statistics of a row's answers of one temperature."""
    answers = next(a for t, a in row.sampled.items() if told.kind == f"sampled_{t:g}")
    reference, length = row.sample.response_ids.tolist(), content_length(row.sample)
    flags = [right_tokens(answer, reference) for answer in answers]
    expected = final_answer(told.reference)
    finals = [None if expected is None else same_final_answer(text, expected) for text in told.answers]
    right = sum(is_right(text, told.reference) for text in told.answers)
    n = len(answers)
    passes = {f"pass_{k}": [pass_at_k(n, right, k), 1.0] for k in sorted({n, *(2**i for i in range(n.bit_length()))})}
    tokens = {"accuracy": [float(np.mean(flags)) * n, float(n)]}
    tokens["last_token"] = [float(sum(one[length - 1] for one in flags)), float(n)] if length else [0.0, 0.0]
    return tokens | (passes if n > 1 else {}) | slip_statistics([one[:length] for one in flags], finals)


def _change(before: str, after: str, reference: str) -> Statistics:
    """Return what a correction did to an answer."""
    was_right, became_right = is_right(before, reference), is_right(after, reference)
    flags = {"wrong_to_right": became_right and not was_right, "right_to_wrong": was_right and not became_right}
    return {name: [float(flag), 1.0] for name, flag in (flags | {"unchanged": before == after}).items()}


def _recovery(row: RowAnswers, tokenizer: PreTrainedTokenizerBase, reference: str) -> Statistics:
    """Return the statistics of the answers after forced errors; nothing if none was forced."""
    if not row.forced:
        return {}
    right = [right_tokens(answer, error.rest_ids) for error, answer, _ in row.forced]
    statistics = recovery_statistics([error for error, *_ in row.forced], right, [loss for *_, loss in row.forced])
    if (expected := final_answer(reference)) is not None:
        texts = [_decode(tokenizer, [*error.start_ids, *answer]) for error, answer, _ in row.forced]
        right_ones = sum(same_final_answer(text, expected) for text in texts)
        statistics["recovery_final_answer"] = [float(right_ones), float(len(texts))]
    return statistics


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]
