"""Forced errors of the built-in tasks, as tokens: the evaluation asks how a model continues after each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from selfgen_ds.data import tasks
from selfgen_ds.data.encoding import tokenize_plain
from selfgen_ds.data.samples import Samples


@dataclass(frozen=True, kw_only=True)
class ForcedError:
    """An answer that starts with an error, as token ids."""

    start_ids: list[int]
    """The start of the answer, which ends with a wrong text."""
    rest_ids: list[int]
    """The rest of the answer, which is right, and the end token."""


def forced_errors(samples: Sequence[Samples], tokenizer: PreTrainedTokenizerBase) -> dict[int, ForcedError]:
    """Return a forced error for every sample id of the test sets of built-in tasks.

    Returns:
        An empty dictionary if any of the sources is no built-in task: recovery is a metric of all rows or of none.
    """
    errors: dict[int, ForcedError] = {}
    for source in samples:
        if (task := tasks.task_of(source.name)) is None:
            return {}
        texts = tasks.forced_error_texts(task)
        starts = tokenize_plain([error.start for error in texts], tokenizer)
        rests = tokenize_plain([error.rest for error in texts], tokenizer)
        for number, (start, rest) in enumerate(zip(starts, rests, strict=True), start=source.first_id):
            errors[number] = ForcedError(start_ids=start, rest_ids=[*rest, tokenizer.eos_token_id])
    return errors
