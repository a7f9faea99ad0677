"""Scores of a model on reference prefixes, on the model's own prefixes, and after errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from selfgen_ds.data.correction import Correction
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.evaluation.answers import EvaluationRequests, ask
from selfgen_ds.evaluation.journal import Journal
from selfgen_ds.evaluation.metrics import SampleScore
from selfgen_ds.evaluation.recovery import ForcedError
from selfgen_ds.evaluation.row_scores import score_rows
from selfgen_ds.model.loading import most_positions
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.progress import bar
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import raise_on_all_ranks


def evaluate(
    policy: EnginePolicy,
    samples: list[TrainingRow],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    requests: EvaluationRequests | None = None,
    poll: Callable[[], None] | None = None,
    journal: Journal | None = None,
    told: str = "evaluate",
) -> list[SampleScore]:
    """Score every row.

    Collective: every rank must call this with the same arguments, because the ranks share the rows and, with sharded
    weights, each forward pass.

    Args:
        batch_size: Rows that a rank holds at once.
        requests: Requests in addition to greedy answers; None for no other request.
        poll: Called after every batch, on all ranks.
        journal: Keeps the scores of every batch, so that an evaluation that was cut short goes on where it was.
        told: Name of the progress bar.

    Returns:
        On rank 0, the scores of all rows in the order of their sample ids; nothing on other ranks, whose hosts would
        hold them several times.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    requests = requests or EvaluationRequests()
    errors, correction = requests.forced_errors, requests.correction
    answer_length = requests.max_new_tokens or _longest_response(samples)  # whatever the batch or the ranks
    positions = most_positions(policy.model.config)
    batches = list(_batches(samples, batch_size, world_size, positions, errors, requests.max_new_tokens))
    longest = max(_longest([s for share in shares for s in share], errors, answer_length) for shares in batches)
    if requests.forced_error_shares or requests.prefix_shares:
        longest += _longest_response(samples)  # a part of a reference stands before the answer
    if correction is not None:
        longest = max(longest, corrected_length(samples, correction, requests.max_new_tokens))
    scores: list[SampleScore] = []
    with policy.gathered(longest):
        for shares in bar(told, "batch", iterable=batches, total=len(batches), leave=False, disable=rank != 0):
            kept = None if journal is None else journal.kept(shares)
            if kept is None:
                rows = ask(policy, shares[rank], answer_length, requests)
                with raise_on_all_ranks() if dist.is_initialized() else nullcontext():  # a user's metric may raise
                    own = score_rows(rows, tokenizer, requests.text, policy.end_tokens)
                of_ranks = process_group.gather_object(own) if dist.is_initialized() else [own]
                kept = [score for of_rank in of_ranks for score in of_rank]
                if journal is not None:
                    journal.keep(kept)
            scores += kept
            if poll is not None:
                poll()
    return sorted(scores, key=lambda score: score.sample_id)


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
