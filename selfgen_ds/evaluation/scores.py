"""The training-inference gap, measured: the model on reference prefixes, on its own, and after a forced error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from selfgen_ds import hashing
from selfgen_ds.data.batches import collate
from selfgen_ds.data.correction import Correction
from selfgen_ds.data.samples import Sample
from selfgen_ds.model.loading import most_positions
from selfgen_ds.model.policy import EnginePolicy, Sampling
from selfgen_ds.ranks import process_group

METRICS = {
    "loss": "negative log-likelihood of a response token given the reference before it",
    "exact_match": "greedy answers whose text is the reference's",
    "teacher_forced_accuracy": "most probable token right, given the reference before it",
    "free_running_accuracy": "token of the greedy answer equal to the reference's at the same position",
}
RECOVERY_METRICS = {
    "recovery_1": "after one forced wrong token: the next greedy token right",
    "recovery_4": "the next 4 right, on average",
    "recovery_last": "the last token of the answer right",
}
SAMPLED_METRICS = {
    "sampled_exact_match": "exact match of answers sampled at the given temperature",
    "sampled_accuracy": "token of the sampled answer equal to the reference's at the same position",
}
CORRECTION_METRICS = {
    "exact_match": "answers after so many corrections whose text is the reference's",
    "wrong_to_right": "answers that this correction made right, of all",
    "right_to_wrong": "answers that this correction made wrong, of all",
    "unchanged": "answers whose text this correction left as it was",
}


def corrected(number: int) -> dict[str, str]:
    """Each of `CORRECTION_METRICS` and its name after a number of corrections, from 1."""
    return {name: f"corrected_{number}_{name}" for name in CORRECTION_METRICS}


@dataclass(frozen=True, kw_only=True)
class SampleScore:
    """One row: its answer, and for each token of the reference response, the last turn, whether it was right."""

    sample_id: int
    prompt: str
    reference: str
    answer: str
    negative_log_likelihood: float
    """Of all target tokens: in a conversation those of every learned turn."""
    tokens: int
    """Target tokens."""
    teacher_forced: list[bool]
    free_running: list[bool]
    recovery: list[bool] | None = None
    sampled: list[bool] | None = None
    sampled_answer: str | None = None
    corrected_answers: list[str] | None = None
    """After 1, 2, ... corrections of `answer`."""

    def metrics(self) -> dict[str, float]:
        """This row's value of every metric; the mean over rows is the metric (for `loss`, over tokens)."""
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
            found = (is_right, is_right and not was_right, was_right and not is_right, after == before)
            values |= {name: float(value) for name, value in zip(corrected(number).values(), found, strict=True)}
        return values


def evaluate(
    policy: EnginePolicy,
    samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    sample_temperature: float = 0.0,
    seed: int = 0,
    correction: Correction | None = None,
    correction_rounds: int = 0,
    poll: Callable[[], None] | None = None,
) -> list[SampleScore]:
    """Score every row. Collective; all ranks get all rows, in the order of their sample ids.

    Args:
        batch_size: Rows a rank holds at once.
        sample_temperature: Above 0, answers sampled at it are scored as well.
        seed: Of the sampled answers.
        correction: How the model is asked to correct its answers, `correction_rounds` times. Answers are then cut where
            the longest reference of all rows ends, so that what is corrected does not depend on the batch.
        poll: Called after every batch, on all ranks.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine: list[SampleScore] = []
    rounds = list(_rounds(samples, batch_size, world_size, most_positions(policy.model.config)))
    longest = max(_longest([sample for share in shares for sample in share]) for shares in rounds)
    corrections = None
    if correction is not None:
        longest = max(longest, corrected_length(samples, correction))
        corrections = _Corrections(ask=correction, rounds=correction_rounds, longest=_longest_response(samples))
    with policy.gathered(longest):
        for shares in tqdm(rounds, desc="evaluate", unit="batch", leave=False, disable=rank != 0 or len(rounds) == 1):
            mine += _score(policy, shares, rank, tokenizer, sample_temperature, seed, corrections)
            if poll is not None:
                poll()
    everyone = process_group.all_gather_object(mine) if dist.is_initialized() else [mine]
    return sorted((score for scores in everyone for score in scores), key=lambda score: score.sample_id)


def aggregate(scores: list[SampleScore]) -> dict[str, float]:
    """Metric name -> value over all rows."""
    rows = [score.metrics() for score in scores]
    metrics = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    tokens = sum(score.tokens for score in scores)
    return metrics | {"loss": sum(score.negative_log_likelihood for score in scores) / tokens}


def curves(scores: list[SampleScore]) -> dict[str, list[float]]:
    """Accuracy by position in the answer, over the rows that reach it.

    `recovery` starts after the forced error and ends before the end token.
    """
    result = {}
    for name in ("teacher_forced", "free_running", "recovery"):
        rows = [asdict(score)[name] for score in scores]
        if None not in rows:
            rows = [row[:-1] for row in rows] if name == "recovery" else rows
            longest = max(map(len, rows))
            result[name] = [float(np.mean([row[i] for row in rows if len(row) > i])) for i in range(longest)]
    return result


def _rounds(
    samples: list[Sample], batch_size: int, world_size: int, positions: int | None
) -> Iterator[list[list[Sample]]]:
    """Rounds of one batch a rank (the last ones may be empty), rows of similar length together.

    Args:
        positions: Of the model: a round's longest prompt and longest answer must fit into them together, since all its
            rows are answered until the last one is.
    """
    chunk: list[Sample] = []
    prompt = answer = 0
    for sample in sorted(samples, key=lambda sample: len(sample.input_ids)):
        forced = 0 if sample.forced_ids is None else len(sample.forced_ids)
        its_prompt, its_answer = len(sample.prompt_ids) + forced, len(sample.response_ids)
        longest = max(prompt, its_prompt) + max(answer, its_answer)
        if chunk and (len(chunk) == batch_size * world_size or (positions is not None and longest > positions)):
            yield [chunk[rank::world_size] for rank in range(world_size)]
            chunk, prompt, answer = [], 0, 0
        chunk.append(sample)
        prompt, answer = max(prompt, its_prompt), max(answer, its_answer)
    yield [chunk[rank::world_size] for rank in range(world_size)]


def _longest(samples: list[Sample]) -> int:
    """Tokens of the longest row when all are answered until the last one is."""
    prompt = max(len(s.prompt_ids) + (0 if s.forced_ids is None else len(s.forced_ids)) for s in samples)
    return prompt + _longest_response(samples)


def _longest_response(samples: list[Sample]) -> int:
    return max(len(sample.response_ids) for sample in samples)


def corrected_length(samples: list[Sample], correction: Correction) -> int:
    """Tokens that the longest prompt, an answer to it, the cue and the corrected answer may come to."""
    prompt = max(len(sample.prompt_ids) for sample in samples)
    return prompt + 2 * _longest_response(samples) + len(correction.closing_ids) + len(correction.cue_ids)


@dataclass(frozen=True, kw_only=True)
class _Corrections:
    ask: Correction
    rounds: int
    longest: int
    """Most tokens of an answer."""


def _score(
    policy: EnginePolicy,
    shares: list[list[Sample]],
    rank: int,
    tokenizer: PreTrainedTokenizerBase,
    sample_temperature: float,
    seed: int,
    corrections: _Corrections | None,
) -> list[SampleScore]:
    """One round: the same calls on every rank, also on one without rows."""
    samples = shares[rank]
    everything = [sample for share in shares for sample in share]
    prompts = [sample.prompt_ids.tolist() for sample in samples]
    references = [sample.response_ids.tolist() for sample in samples]
    longest = _longest_response(everything) if corrections is None else corrections.longest

    batch = collate([[sample] for sample in samples])
    best, log_probabilities = policy.predict(batch.to(policy.device))
    right = best.cpu() == batch.target[batch.loss_mask]
    sizes = batch.loss_mask.sum(dim=1).tolist()  # of all turns; an answer is the last one
    teacher_forced = right.split(sizes)
    likelihoods = log_probabilities.cpu().split(sizes)

    free = policy.complete(prompts, longest)
    recovery = sampled = None
    if everything[0].rest_ids is not None:
        rest = max(len(_array(sample.rest_ids)) for sample in everything)
        forced = [[*p, *_array(sample.forced_ids)] for p, sample in zip(prompts, samples, strict=True)]
        recovery = policy.complete(forced, rest)
    if sample_temperature > 0:
        sample_ids = torch.tensor([sample.sample_id for sample in samples], device=policy.device)

        def draws(numbers: Tensor, positions: Tensor) -> Tensor:
            return hashing.uniform(hashing.EVALUATION, seed, sample_ids[numbers], positions)

        sampled = policy.complete(prompts, longest, draws, Sampling(temperature=sample_temperature))

    answers = [free]
    if corrections is not None:
        for _ in range(corrections.rounds):
            asked = [corrections.ask.prompt(p, latest) for p, latest in zip(prompts, answers[-1], strict=True)]
            answers.append(policy.complete(asked, longest))

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return [
        SampleScore(
            sample_id=sample.sample_id,
            prompt=text(prompts[i]),
            reference=text(references[i]),
            answer=text(free[i]),
            negative_log_likelihood=-float(likelihoods[i].sum()),
            tokens=len(likelihoods[i]),
            teacher_forced=teacher_forced[i][-len(references[i]) :].tolist(),
            free_running=_right(free[i], references[i]),
            recovery=None if recovery is None else _right(recovery[i], _array(sample.rest_ids).tolist()),
            sampled=None if sampled is None else _right(sampled[i], references[i]),
            sampled_answer=None if sampled is None else text(sampled[i]),
            corrected_answers=None if corrections is None else [text(some[i]) for some in answers[1:]],
        )
        for i, sample in enumerate(samples)
    ]


def _array(ids: np.ndarray | None) -> np.ndarray:
    """Of a built-in task's sample, which has them."""
    assert ids is not None
    return ids


def _right(answer: list[int], reference: list[int]) -> list[bool]:
    """Position by position; what the answer lacks is wrong."""
    return [i < len(answer) and answer[i] == token for i, token in enumerate(reference)]
