"""The questions that an evaluation asks a model, and its answers, as token ids.

Every function here is collective: every rank must call it, even without rows, because the ranks run the model together
when its weights are sharded. So the order and the number of calls depend on the requests alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from selfgen_ds import hashing
from selfgen_ds.data.batches import collate
from selfgen_ds.data.correction import Correction
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.evaluation.excess_error import divergences
from selfgen_ds.evaluation.recovery import ForcedError, content_length, second_choice
from selfgen_ds.evaluation.text_metrics import TextMetrics
from selfgen_ds.model.head import Prediction
from selfgen_ds.model.policy import EnginePolicy, Sampling


@dataclass(frozen=True, kw_only=True)
class EvaluationRequests:
    """Requests to the model in addition to greedy answers."""

    text: TextMetrics = field(default_factory=lambda: TextMetrics(with_ter=False))
    """The metrics of the answers' texts."""
    forced_errors: dict[int, ForcedError] = field(default_factory=dict)
    """A forced error for every sample id (`selfgen_ds.evaluation.recovery`); empty if the data has none of its own."""
    forced_error_shares: tuple[float, ...] = ()
    """Without `forced_errors`: the places of the reference, as shares of its length, where the model's own second
    choice is forced."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; None for the length of the longest reference of all rows."""
    sample_temperatures: tuple[float, ...] = ()
    """Temperatures at which answers are sampled and scored as well."""
    answers_per_prompt: int = 1
    """Answers that are sampled at each temperature."""
    prefix_shares: tuple[float, ...] = ()
    """Shares of the reference that the model is given, and continues."""
    oracle: EnginePolicy | None = None
    """A better model of the same tokens, for the excess error (`selfgen_ds.evaluation.excess_error`)."""
    seed: int = 0
    """Seed of the sampled answers."""
    correction: Correction | None = None
    """How the model is asked to correct its answers."""
    correction_rounds: int = 0


@dataclass(frozen=True, kw_only=True)
class RowAnswers:
    """What the model said of one row."""

    sample: TrainingRow
    prediction: Prediction
    """Of every target token (in a conversation, of every learned turn), given the reference before it: `[tokens]`."""
    answer: list[int]
    """The greedy answer."""
    after_own: Prediction
    """Of the reference's tokens, given the greedy answer before each of them: `[tokens]`, up to one more than the
    answer has."""
    forced: list[tuple[ForcedError, list[int], float]]
    """Forced errors, the greedy answers after them, and the sums of the negative log-likelihoods of the right tokens
    after them."""
    sampled: dict[float, list[list[int]]]
    """Temperature -> sampled answers."""
    continued: dict[float, tuple[int, list[int]]]
    """Share of the reference that was given -> its tokens, and the greedy continuation."""
    corrected: list[list[int]]
    """The answers after 1, 2, ... corrections of `answer`."""
    divergences: list[list[float]]
    """The divergences from the oracle by position, after the model's own tokens and after the reference's, as far as
    both go; empty without an oracle."""


def ask(
    policy: EnginePolicy, samples: list[TrainingRow], longest: int, requests: EvaluationRequests
) -> list[RowAnswers]:
    """Ask the model everything that is requested of this rank's rows of a batch.

    Args:
        longest: Most tokens of an answer, the same on all ranks.
    """
    predictions = _predict(policy, samples)
    answers = policy.complete([sample.prompt_ids.tolist() for sample in samples], longest)
    after_own = _predict(policy, [_after(policy, *pair) for pair in zip(samples, answers, strict=True)])
    forced = _force(policy, samples, predictions, longest, requests)
    sampled = {t: _sample(policy, samples, longest, t, requests) for t in requests.sample_temperatures}
    continued = {share: _continue(policy, samples, share, longest) for share in requests.prefix_shares}
    corrected = _correct(policy, samples, answers, longest, requests)
    diverging = _diverge(policy, samples, longest, requests, sampled.get(1.0))
    return [
        RowAnswers(
            sample=sample,
            prediction=predictions[i],
            answer=answers[i],
            after_own=after_own[i],
            forced=forced[i],
            sampled={t: rows[i] for t, rows in sampled.items()},
            continued={share: rows[i] for share, rows in continued.items()},
            corrected=[rows[i] for rows in corrected],
            divergences=diverging[i],
        )
        for i, sample in enumerate(samples)
    ]


def _predict(policy: EnginePolicy, rows: list[TrainingRow]) -> list[Prediction]:
    """Predict the targets of rows from their contexts."""
    batch = collate([[row] for row in rows])
    sizes = batch.loss_mask.sum(dim=1).tolist()
    parts = [values.split(sizes) for values in policy.predict(batch)]
    return [Prediction(*(part[i] for part in parts)) for i in range(len(rows))]


def _after(policy: EnginePolicy, sample: TrainingRow, answer: list[int]) -> TrainingRow:
    """Return a row whose context has an answer in place of the last response, which stays the target.

    Only targets after tokens of the answer are left: the first one, and one after each token but the end token.
    """
    ended = bool(answer) and answer[-1] in policy.end_tokens
    start, end = len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.response_ids)
    context, loss_mask = sample.context_ids.copy(), np.zeros_like(sample.loss_mask)
    given = answer[: end - start]
    context[start : start + len(given)] = given
    loss_mask[start : min(end, start + len(answer) + 1 - ended)] = True
    return replace(sample, context_ids=context, loss_mask=loss_mask)


def _force(
    policy: EnginePolicy,
    samples: list[TrainingRow],
    predictions: list[Prediction],
    longest: int,
    requests: EvaluationRequests,
) -> list[list[tuple[ForcedError, list[int], float]]]:
    """Force errors, one after the other, and return them with the answers after them, per row."""
    forced: list[list[tuple[ForcedError, list[int], float]]] = [[] for _ in samples]
    for share in (0.0,) if requests.forced_errors else requests.forced_error_shares:
        errors: dict[int, ForcedError] = {}
        for i, (sample, prediction) in enumerate(zip(samples, predictions, strict=True)):
            size = len(sample.response_ids)
            best, second = prediction.best[-size:].tolist(), prediction.second[-size:].tolist()
            error = requests.forced_errors.get(sample.sample_id) or second_choice(sample, share, best, second)
            if error is not None:
                errors[i] = error
        starts = [[*samples[i].prompt_ids.tolist(), *error.start_ids] for i, error in errors.items()]
        answers = policy.complete(starts, longest)
        rights = _predict(policy, [_row(start, e.rest_ids) for start, e in zip(starts, errors.values(), strict=True)])
        for (i, error), answer, right in zip(errors.items(), answers, rights, strict=True):
            forced[i].append((error, answer, -float(right.log_probability.sum())))
    return forced


def _row(prompt_ids: list[int], response_ids: list[int]) -> TrainingRow:
    """Return a row of a prompt and a response, to be predicted."""
    ids = np.array([*prompt_ids, *response_ids])
    return TrainingRow.reference(-1, ids, np.array([[len(prompt_ids), len(ids), len(ids)]]))


def _sample(
    policy: EnginePolicy, samples: list[TrainingRow], longest: int, temperature: float, requests: EvaluationRequests
) -> list[list[list[int]]]:
    """Return, per row, answers drawn at a temperature.

    The draws depend on seed, sample id, number of the answer and position alone: not on the batch, nor on the number of
    ranks, nor on the temperature.
    """
    sample_ids = torch.tensor([sample.sample_id for sample in samples])
    prompts = [sample.prompt_ids.tolist() for sample in samples]
    drawn = []
    for number in range(requests.answers_per_prompt):

        def noise(rows: Tensor, positions: Tensor, number: int = number) -> Tensor:
            key = (number,) if number else ()
            return hashing.uniform(hashing.EVALUATION, requests.seed, *key, sample_ids[rows], positions)

        drawn.append(policy.complete(prompts, longest, noise, Sampling(temperature=temperature)))
    return [[answers[i] for answers in drawn] for i in range(len(samples))]


def _diverge(
    policy: EnginePolicy,
    samples: list[TrainingRow],
    longest: int,
    requests: EvaluationRequests,
    sampled: list[list[list[int]]] | None,
) -> list[list[list[float]]]:
    """Return, per row, the divergences from the oracle after answers sampled at temperature 1, and after references.

    Args:
        sampled: The answers of that temperature, if they have been drawn already.
    """
    if requests.oracle is None:
        return [[] for _ in samples]
    sampled = sampled or _sample(policy, samples, longest, 1.0, replace(requests, answers_per_prompt=1))
    known = requests.oracle.model.get_input_embeddings().num_embeddings
    # A model whose head is padded further may draw what is no token.
    firsts = [[*takewhile(lambda token: token < known, answers[0])] for answers in sampled]
    own = [_after(policy, sample, answer) for sample, answer in zip(samples, firsts, strict=True)]
    given = [_row(sample.prompt_ids.tolist(), sample.response_ids.tolist()) for sample in samples]
    both = (divergences(policy, requests.oracle, rows) for rows in (own, given))
    return [[after[: min(map(len, pair))] for after in pair] for pair in zip(*both, strict=True)]


def _continue(
    policy: EnginePolicy, samples: list[TrainingRow], share: float, longest: int
) -> list[tuple[int, list[int]]]:
    """Return, per row, the number of the reference's tokens that were given, and the greedy continuation."""
    given = [int(share * content_length(sample)) for sample in samples]
    prompts = [s.target_ids[: len(s.prompt_ids) + count].tolist() for s, count in zip(samples, given, strict=True)]
    return list(zip(given, policy.complete(prompts, longest), strict=True))


def _correct(
    policy: EnginePolicy,
    samples: list[TrainingRow],
    answers: list[list[int]],
    longest: int,
    requests: EvaluationRequests,
) -> list[list[list[int]]]:
    """Return the answers after 1, 2, ... corrections of `answers`; none if no corrections are asked for."""
    if requests.correction is None:
        return []
    prompts, rounds = [sample.prompt_ids.tolist() for sample in samples], []
    for _ in range(requests.correction_rounds):
        asked = [requests.correction.prompt(p, latest) for p, latest in zip(prompts, answers, strict=True)]
        answers = policy.complete(asked, longest)
        rounds.append(answers)
    return rounds
