"""Errors in the context: forced ones, after which the model continues, and those that it samples itself.

A built-in task knows an error that changes everything after it. On other data, the error is the model's own second
choice: its most probable token, or the second one if the first is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from selfgen_ds.data import tasks
from selfgen_ds.data.encoding import tokenize_plain
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.samples import Samples
from selfgen_ds.evaluation.text_metrics import Statistics

_NEXT = 4  # tokens after an error that `recovery_4` and `after_slip_4` count


@dataclass(frozen=True, kw_only=True)
class ForcedError:
    """An answer that starts with an error, as token ids."""

    start_ids: list[int]
    """The start of the answer, which ends with a wrong token."""
    rest_ids: list[int]
    """The rest of the answer, which is right, and the tokens that close it."""
    closing: int = 1
    """Number of tokens of `rest_ids` that close the answer."""


def forced_errors(samples: Sequence[Samples], tokenizer: PreTrainedTokenizerBase) -> dict[int, ForcedError]:
    """Return a forced error for every sample id of built-in tasks.

    Returns:
        An empty dictionary if any of the sources is no built-in task.
    """
    errors: dict[int, ForcedError] = {}
    for source in samples:
        if (task := tasks.task_of(source.name)) is None:
            return {}
        texts = tasks.forced_error_texts(task, tasks.split_of(source.name, "test"))
        starts = tokenize_plain([error.start for error in texts], tokenizer)
        rests = tokenize_plain([error.rest for error in texts], tokenizer)
        for number, (start, rest) in enumerate(zip(starts, rests, strict=True), start=source.first_id):
            errors[number] = ForcedError(start_ids=start, rest_ids=[*rest, tokenizer.eos_token_id])
    return errors


def second_choice(sample: TrainingRow, share: float, best: list[int], second: list[int]) -> ForcedError | None:
    """Return the error that the model is most inclined to make at a place of the reference.

    Args:
        share: The place, as a share of the reference's tokens without those that close it: 0 is the first token.
        best: The most probable tokens at the reference's positions.
        second: The second most probable ones.

    Returns:
        None if no token of the reference would follow the error.
    """
    reference, length = sample.response_ids.tolist(), content_length(sample)
    at = int(share * length)
    if at + 1 >= length:
        return None
    wrong = best[at] if best[at] != reference[at] else second[at]
    return ForcedError(
        start_ids=[*reference[:at], wrong], rest_ids=reference[at + 1 :], closing=len(reference) - length
    )


def content_length(sample: TrainingRow) -> int:
    """Return the number of tokens of the last response without those that close it."""
    replaceable = np.flatnonzero(sample.replaceable_mask[len(sample.prompt_ids) :])
    return int(replaceable[-1]) + 1 if len(replaceable) else 0


def recovery_statistics(
    errors: Sequence[ForcedError], right: Sequence[list[bool]], losses: Sequence[float]
) -> Statistics:
    """Return the statistics of the continuations after forced errors.

    Args:
        right: Per error and token of `rest_ids`, whether the continuation has it there.
        losses: Per error, the sum of the negative log-likelihoods of `rest_ids`, in nats.
    """
    row = {name: [0.0, 0.0] for name in ("recovery_1", "recovery_4", "recovery_last", "recovery_loss")}
    for error, flags, loss in zip(errors, right, losses, strict=True):
        answer = flags[: len(flags) - error.closing]
        _count(row, {"recovery_1": answer[:1], "recovery_4": answer[:_NEXT], "recovery_last": answer[-1:]})
        row["recovery_loss"] = [row["recovery_loss"][0] + loss, row["recovery_loss"][1] + len(flags)]
    return row


def slip_statistics(right: Sequence[list[bool]], is_right: Sequence[bool | None]) -> Statistics:
    """Return the statistics of what follows the first token of an answer that is unlike the reference's.

    Slips among the last four tokens are not counted, because little follows them; nor are rows without other tokens.

    Args:
        right: Per answer and token of the reference, without those that close it, whether the answer has it there.
        is_right: Per answer, whether its final answer is right; None if the reference has none.
    """
    names = ("slips", "after_slip_1", "after_slip_4", "after_slip_last", "after_slip_final_answer")
    row = {name: [0.0, 0.0] for name in names}
    for flags, final in zip(right, is_right, strict=True):
        first = flags.index(False) if False in flags else len(flags)
        slipped = first < len(flags) - _NEXT
        _count(row, {"slips": [slipped] if len(flags) > _NEXT else []})
        if slipped:
            after = flags[first + 1 :]
            _count(row, {"after_slip_1": after[:1], "after_slip_4": after[:_NEXT], "after_slip_last": after[-1:]})
            _count(row, {"after_slip_final_answer": [] if final is None else [final]})
    return row


def _count(row: Statistics, flags: dict[str, list[bool]]) -> None:
    """Add the share of the flags that are true to each mean of a row; nothing without flags."""
    for name, values in flags.items():
        if values:
            row[name] = [row[name][0] + sum(values) / len(values), row[name][1] + 1.0]
