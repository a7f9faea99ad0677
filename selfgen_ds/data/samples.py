"""Rows of text -> samples of token ids.

The plain format: `prompt ids + completion ids + end token`. Prompt and completion are tokenised apart, so
that the boundary is a token boundary; the prompt gets the tokenizer's own begin token where it has one.
Special tokens that a text happens to spell stay text. The
response is everything after the prompt: the loss falls on all of it, and all of it but the last token may be
replaced (nothing ever reads the last one; untruncated, it is the end token).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import datasets
from transformers import PreTrainedTokenizerBase

from selfgen_ds.config import InputError
from selfgen_ds.data.tasks import Row

_CHUNK = 1000  # rows tokenised at once


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A tokenised data set.

    `rows` is an Arrow table with the columns `sample_id` (the row's number in its source, from 0),
    `prompt_ids`, `response_ids` and, for built-in tasks, `forced_ids` and `rest_ids`.
    """

    rows: datasets.Dataset
    truncated: int
    refused: int

    def __len__(self) -> int:
        return len(self.rows)

    def checksum(self) -> int:
        """CRC-32 of all ids, to know the same data again."""
        crc = 0
        for name in ("prompt_ids", "response_ids"):
            for chunk in self.rows.data.column(name).chunks:
                for numbers in (chunk.offsets, chunk.values):
                    crc = zlib.crc32(numbers.to_numpy().tobytes(), crc)
        return crc


def tokenize(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    max_length: int,
    max_truncated_share: float = 1.0,
    max_refused_share: float = 0.0,
) -> Samples:
    """Tokenise rows; responses are cut at `max_length`, rows whose prompt leaves no room for one are refused.

    Raises:
        InputError: No usable row, or more truncated or refused ones than the shares allow.
    """
    columns: dict[str, list] = {
        name: [] for name in ("sample_id", "prompt_ids", "response_ids", "forced_ids", "rest_ids")
    }
    truncated = refused = count = 0
    first_refused = ""
    iterator = iter(rows)
    while chunk := list(islice(iterator, _CHUNK)):
        prompts = tokenizer([row.prompt for row in chunk], split_special_tokens=True)["input_ids"]
        completions = _plain(tokenizer, [row.completion for row in chunk])
        forced = _plain(tokenizer, [row.forced or "" for row in chunk])
        rest = _plain(tokenizer, [row.rest or "" for row in chunk])
        for offset, row in enumerate(chunk):
            prompt = prompts[offset]
            if prompt and prompt[-1] == tokenizer.eos_token_id:
                prompt = prompt[:-1]  # some tokenizers close every text
            response = [*completions[offset], tokenizer.eos_token_id]
            room = max_length - len(prompt)
            if room < 1 or not prompt:
                first_refused = first_refused or row.where or f"row {count + offset + 1}"
                refused += 1
                continue
            truncated += len(response) > room
            columns["sample_id"].append(count + offset)
            columns["prompt_ids"].append(prompt)
            columns["response_ids"].append(response[:room])
            has_error = row.forced is not None
            columns["forced_ids"].append(forced[offset] if has_error else None)
            columns["rest_ids"].append([*rest[offset], tokenizer.eos_token_id] if has_error else None)
        count += len(chunk)
    if refused > max_refused_share * count:
        raise InputError(
            f"{source}: {refused} of {count} prompts leave no room for a response within data.max_length="
            f"{max_length} (the first is {first_refused}); data.max_refused_share={max_refused_share} allows fewer"
        )
    if not columns["sample_id"]:
        raise InputError(f"{source}: no usable row among {count}")
    if truncated > max_truncated_share * count:
        raise InputError(
            f"{source}: {truncated} of {count} responses are cut at data.max_length={max_length}; "
            f"data.max_truncated_share={max_truncated_share} allows fewer"
        )
    ids = datasets.List(datasets.Value("int32"))
    features = datasets.Features(dict.fromkeys(columns, ids) | {"sample_id": datasets.Value("int64")})
    return Samples(rows=datasets.Dataset.from_dict(columns, features=features), truncated=truncated, refused=refused)


def _plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
