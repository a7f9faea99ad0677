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

from selfgen_ds.data.chat import ChatEncoder, Encoded
from selfgen_ds.data.conversation import Conversation
from selfgen_ds.data.row_checks import Refused, Row, TextPair
from selfgen_ds.data.turns import Rendered
from selfgen_ds.errors import InputError

CHUNK_ROWS, CHUNK_CHARACTERS = 1000, 1_000_000
"""A chunk has this many rows at most, and ends with the row that brings its text above this many characters."""


def chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Cut rows into chunks that are tokenized at once, so that the memory for a chunk is bounded."""
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        if isinstance(row, Conversation):
            size += sum(len(str(message.get("content"))) for message in row.messages)
        elif isinstance(row, TextPair):
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
        self.unlike_inference: list[str] = []
        """What the template shows otherwise than at inference, once for every conversation of which this is true."""

    def encode(self, rows: list[Row]) -> Iterator[Encoded | Refused]:
        """Yield the token ids of each row and its turns, or why the row cannot be used.

        Raises:
            InputError: The tokenizer cannot encode conversations.
        """
        for kind, run in groupby(rows, key=type):
            if kind is Conversation:
                yield from self._conversations(cast("list[Conversation]", list(run)))
            elif kind is TextPair:
                yield from self._pairs(cast("list[TextPair]", list(run)))
            else:
                yield from cast("list[Refused]", list(run))

    def _conversations(self, conversations: list[Conversation]) -> Iterator[Encoded | Refused]:
        chat = self._chat = self._chat or ChatEncoder(self._tokenizer, self._assistant_turns)
        rendered = [_rendered_or_refused(chat, conversation) for conversation in conversations]
        texts = [row for row in rendered if isinstance(row, Rendered)]
        self.unlike_inference += [row.unlike_inference for row in texts if row.unlike_inference]
        encoded = chat.tokenize(texts) if texts else iter(())
        for row in rendered:
            yield row if isinstance(row, Refused) else next(encoded)

    def _pairs(self, pairs: list[TextPair]) -> Iterator[Encoded]:
        end = self._tokenizer.eos_token_id
        prompts = self._tokenizer([pair.prompt for pair in pairs], split_special_tokens=True)["input_ids"]
        completions = tokenize_plain([pair.completion for pair in pairs], self._tokenizer)
        for prompt, completion in zip(prompts, completions, strict=True):
            if prompt and prompt[-1] == end:
                prompt = prompt[:-1]  # some tokenizers end every text with the end token
            ids = [*prompt, *completion, end]
            yield ids, [[len(prompt), len(ids) - 1, len(ids)]]


def _rendered_or_refused(chat: ChatEncoder, conversation: Conversation) -> Rendered | Refused:
    try:
        return chat.render(conversation)
    except InputError as error:
        return Refused(reason=str(error))
