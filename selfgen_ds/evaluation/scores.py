"""Scores of a model on reference prefixes, on the model's own prefixes, and after a forced error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfgen_ds import hashing
from selfgen_ds.data.batches import collate
from selfgen_ds.data.correction import Correction
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.evaluation.metrics import SampleScore
from selfgen_ds.evaluation.recovery import ForcedError
from selfgen_ds.model.loading import most_positions
from selfgen_ds.model.policy import EnginePolicy, Sampling
from selfgen_ds.progress import bar
from selfgen_ds.ranks import process_group


@dataclass(frozen=True, kw_only=True)
class EvaluationRequests:
    """Requests to the model in addition to greedy answers."""

    forced_errors: dict[int, ForcedError] = field(default_factory=dict)
    """A forced error for every sample id (`selfgen_ds.evaluation.recovery`); empty if recovery is not scored."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; None for the length of the longest reference of the batch."""
    sample_temperature: float = 0.0
    """If above 0, answers sampled at this temperature are scored as well."""
    seed: int = 0
    """Seed of the sampled answers."""
    correction: Correction | None = None
    """How the model is asked to correct its answers. Answers are then cut at the length of the longest reference of all
    rows, so that the text to correct does not depend on the batch."""
    correction_rounds: int = 0


def evaluate(
    policy: EnginePolicy,
    samples: list[TrainingRow],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    requests: EvaluationRequests | None = None,
    poll: Callable[[], None] | None = None,
) -> list[SampleScore]:
    """Score every row.

    Collective: every rank must call this with the same arguments, because the ranks share the rows and, with sharded
    weights, each forward pass.

    Args:
        batch_size: Rows that a rank holds at once.
        requests: Requests in addition to greedy answers; None for no other request.
        poll: Called after every batch, on all ranks.

    Returns:
        The scores of all rows on every rank, in the order of their sample ids.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    requests = requests or EvaluationRequests()
    errors, correction = requests.forced_errors, requests.correction
    answer_length = requests.max_new_tokens
    if correction is not None:
        answer_length = answer_length or _longest_response(samples)
    positions = most_positions(policy.model.config)
    batches = list(_batches(samples, batch_size, world_size, positions, errors, answer_length))
    longest = max(_longest([s for share in shares for s in share], errors, answer_length) for shares in batches)
    if correction is not None:
        longest = max(longest, corrected_length(samples, correction, requests.max_new_tokens))
    scores: list[SampleScore] = []
    with policy.gathered(longest):
        for shares in bar("evaluate", "batch", iterable=batches, total=len(batches), leave=False, disable=rank != 0):
            scores += _score(policy, shares, rank, tokenizer, requests, answer_length)
            if poll is not None:
                poll()
    scores_of_ranks = process_group.all_gather_object(scores) if dist.is_initialized() else [scores]
    return sorted((score for some in scores_of_ranks for score in some), key=lambda score: score.sample_id)


def _batches(
    samples: list[TrainingRow],
    batch_size: int,
    world_size: int,
    positions: int | None,
    errors: dict[int, ForcedError],
    answer_length: int | None,
) -> Iterator[list[list[TrainingRow]]]:
    """Yield, batch by batch, the rows of every rank; rows of similar length come together.

    The last batch may leave a rank without rows.

    Args:
        positions: Positions of the model; None if the model sets no limit. The longest prompt and the longest answer
            of a batch must fit into them together, because all rows are continued until the last one has ended.
        answer_length: Most tokens of an answer; None for those of the row's reference.
    """
    batch: list[TrainingRow] = []
    longest_prompt = longest_answer = 0
    for sample in sorted(samples, key=len):
        prompt, answer = _prompt_length(sample, errors), answer_length or len(sample.response_ids)
        longest = max(longest_prompt, prompt) + max(longest_answer, answer)
        if batch and (len(batch) == batch_size * world_size or (positions is not None and longest > positions)):
            yield [batch[rank::world_size] for rank in range(world_size)]
            batch, longest_prompt, longest_answer = [], 0, 0
        batch.append(sample)
        longest_prompt, longest_answer = max(longest_prompt, prompt), max(longest_answer, answer)
    yield [batch[rank::world_size] for rank in range(world_size)]


def _prompt_length(sample: TrainingRow, errors: dict[int, ForcedError]) -> int:
    """Return the tokens of a prompt and of the forced error that may follow the prompt."""
    return len(sample.prompt_ids) + (len(errors[sample.sample_id].start_ids) if errors else 0)


def _longest(samples: list[TrainingRow], errors: dict[int, ForcedError], answer_length: int | None) -> int:
    """Return the tokens of a batch's longest row, if all rows are continued until the last one has ended."""
    answer = max(answer_length or 0, _longest_response(samples))  # the reference is read too
    return max(_prompt_length(sample, errors) for sample in samples) + answer


def _longest_response(samples: list[TrainingRow]) -> int:
    return max(len(sample.response_ids) for sample in samples)


def answered_length(samples: list[TrainingRow], max_new_tokens: int) -> int:
    """Return the most tokens that a prompt and an answer may come to together."""
    return max(len(sample.prompt_ids) for sample in samples) + max_new_tokens


def corrected_length(samples: list[TrainingRow], correction: Correction, max_new_tokens: int | None = None) -> int:
    """Return the most tokens that prompt, answer, cue, and corrected answer may come to together."""
    answer = max_new_tokens or _longest_response(samples)
    return answered_length(samples, 2 * answer) + len(correction.closing_ids) + len(correction.cue_ids)


def _score(
    policy: EnginePolicy,
    shares: list[list[TrainingRow]],
    rank: int,
    tokenizer: PreTrainedTokenizerBase,
    requests: EvaluationRequests,
    answer_length: int | None,
) -> list[SampleScore]:
    """Return the scores of this rank's rows of a batch.

    Collective: every rank must call this, even without rows, because the ranks run the model together.

    Args:
        answer_length: Most tokens of an answer; None for the length of the longest reference of the batch.
    """
    samples, errors = shares[rank], requests.forced_errors
    all_samples = [sample for share in shares for sample in share]
    prompts = [sample.prompt_ids.tolist() for sample in samples]
    references = [sample.response_ids.tolist() for sample in samples]
    longest = answer_length or _longest_response(all_samples)

    # The order of these calls is the same on every rank.
    teacher_forced, log_probabilities = _predict(policy, samples)
    answers = policy.complete(prompts, longest)
    recovery = _recover(policy, samples, all_samples, errors)
    sampled = _sample(policy, samples, longest, requests)
    corrected = _correct(policy, prompts, answers, longest, requests)

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return [
        SampleScore(
            sample_id=sample.sample_id,
            prompt=text(prompts[i]),
            reference=text(references[i]),
            answer=text(answers[i]),
            negative_log_likelihood=-float(log_probabilities[i].sum()),
            tokens=len(log_probabilities[i]),
            teacher_forced=teacher_forced[i][-len(references[i]) :].tolist(),
            free_running=_right(answers[i], references[i]),
            unfinished=not answers[i] or answers[i][-1] not in policy.end_tokens,
            recovery=None if recovery is None else _right(recovery[i], errors[sample.sample_id].rest_ids),
            sampled=None if sampled is None else _right(sampled[i], references[i]),
            sampled_answer=None if sampled is None else text(sampled[i]),
            corrected_answers=None if corrected is None else [text(some[i]) for some in corrected],
        )
        for i, sample in enumerate(samples)
    ]


def _predict(policy: EnginePolicy, samples: list[TrainingRow]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Predict every target token given the reference before it.

    Returns:
        Per sample, over its target tokens (in a conversation, of every learned turn): whether the most probable token
        is right, `[tokens]` bool, and the log-probability of the reference, `[tokens]` float32.
    """
    batch = collate([[sample] for sample in samples])
    most_probable, log_probabilities = policy.predict(batch.to(policy.device))
    right = most_probable.cpu() == batch.target_ids[batch.loss_mask]
    sizes = batch.loss_mask.sum(dim=1).tolist()
    return right.split(sizes), log_probabilities.cpu().split(sizes)


def _recover(
    policy: EnginePolicy, samples: list[TrainingRow], all_samples: list[TrainingRow], errors: dict[int, ForcedError]
) -> list[list[int]] | None:
    """Return the greedy answers after a forced error; None without forced errors."""
    if not errors:
        return None
    longest = max(len(errors[sample.sample_id].rest_ids) for sample in all_samples)
    return policy.complete([[*s.prompt_ids.tolist(), *errors[s.sample_id].start_ids] for s in samples], longest)


def _sample(
    policy: EnginePolicy, samples: list[TrainingRow], longest: int, requests: EvaluationRequests
) -> list[list[int]] | None:
    """Return answers drawn at `sample_temperature`; None at a temperature of 0.

    The draws depend on seed, sample id, and position alone: not on the batch, nor on the number of ranks.
    """
    if requests.sample_temperature <= 0:
        return None
    sample_ids = torch.tensor([sample.sample_id for sample in samples], device=policy.device)

    def noise(numbers: Tensor, positions: Tensor) -> Tensor:
        return hashing.uniform(hashing.EVALUATION, requests.seed, sample_ids[numbers], positions)

    prompts = [sample.prompt_ids.tolist() for sample in samples]
    return policy.complete(prompts, longest, noise, Sampling(temperature=requests.sample_temperature))


def _correct(
    policy: EnginePolicy, prompts: list[list[int]], answers: list[list[int]], longest: int, requests: EvaluationRequests
) -> list[list[list[int]]] | None:
    """Return the answers after 1, 2, ... corrections of `answers`; None if no corrections are asked for."""
    if requests.correction is None:
        return None
    rounds = []
    for _ in range(requests.correction_rounds):
        asked = [requests.correction.prompt(p, latest) for p, latest in zip(prompts, answers, strict=True)]
        answers = policy.complete(asked, longest)
        rounds.append(answers)
    return rounds


def _right(answer: list[int], reference: list[int]) -> list[bool]:
    """Return, per token of the reference, whether the answer has the token at the same position."""
    return [i < len(answer) and answer[i] == token for i, token in enumerate(reference)]
