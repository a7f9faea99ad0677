"""Encode rows of text as token ids, with the turns that are learned.

A pair of texts becomes `prompt ids + completion ids + end token`. Prompt and completion are tokenized apart, so that
the boundary between them is a boundary of tokens. The prompt gets the begin token that the tokenizer puts there.
Special tokens that a text happens to spell stay text. A conversation is encoded by the chat template
(`selfgen_ds.data.chat`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import cast

from transformers import PreTrainedTokenizerBase

from selfgen_ds.data.chat import ChatEncoder, Conversation
from selfgen_ds.data.row_checks import TextPair

CHUNK_ROWS, CHUNK_CHARACTERS = 1000, 1_000_000
"""A chunk has this many rows at most, and ends with the row that brings its text above this many characters."""


def chunks(rows: Iterator[TextPair | Conversation]) -> Iterator[list[TextPair | Conversation]]:
    """Cut rows into chunks that are tokenized at once, so that the memory for a chunk is bounded."""
    chunk: list[TextPair | Conversation] = []
    size = 0
    for row in rows:
        chunk.append(row)
        if isinstance(row, Conversation):
            size += sum(len(message.get("content") or "") for message in row.messages)
        else:
            size += len(row.prompt) + len(row.completion)
        if len(chunk) == CHUNK_ROWS or size > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def tokenize_plain(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize texts without any special token: special tokens that a text happens to spell stay text."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


class Encoder:
    """Encodes rows of either kind: pairs of texts and conversations.

    Args:
        assistant_turns: `all` or `last`: the turns of a conversation that are learned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_turns: str) -> None:
        self._tokenizer = tokenizer
        self._assistant_turns = assistant_turns
        self._chat: ChatEncoder | None = None

    def encode(self, rows: list[TextPair | Conversation]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yield the token ids of each row and its turns: `[start, end of the replaceable part, end]`, in tokens.

        Raises:
            InputError: The chat template does not reproduce a conversation; the error names the row.
        """
        for kind, run in groupby(rows, key=type):
            if kind is Conversation:
                self._chat = self._chat or ChatEncoder(self._tokenizer, self._assistant_turns)
                yield from self._chat.encode(cast("list[Conversation]", list(run)))
            else:
                yield from self._pairs(cast("list[TextPair]", list(run)))

    def _pairs(self, pairs: list[TextPair]) -> Iterator[tuple[list[int], list[list[int]]]]:
        end = self._tokenizer.eos_token_id
        prompts = self._tokenizer([pair.prompt for pair in pairs], split_special_tokens=True)["input_ids"]
        completions = tokenize_plain([pair.completion for pair in pairs], self._tokenizer)
        for prompt, completion in zip(prompts, completions, strict=True):
            if prompt and prompt[-1] == end:
                prompt = prompt[:-1]  # some tokenizers end every text with the end token
            ids = [*prompt, *completion, end]
            yield ids, [[len(prompt), len(ids) - 1, len(ids)]]
