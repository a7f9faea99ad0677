"""Encode rows of text as token ids, with the turns that are learned.

A pair of texts becomes `prompt ids + completion ids + end token`. Prompt and completion are tokenized apart, so that
the boundary between them is a boundary of tokens. The prompt gets the begin token that the tokenizer puts there.
Special tokens that a text happens to spell stay text. A conversation is encoded by the chat template
(`selfgen_ds.chat.encoder`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.chat.encoder import ChatEncoder, Encoded
from selfgen_ds.chat.turns import Rendered
from selfgen_ds.data.row_checks import Columns, Refused, Row, TextPair
from selfgen_ds.errors import InputError

CHUNK_ROWS, CHUNK_CHARACTERS = 1000, 1_000_000
"""A chunk has this many rows at most, and ends with the row that brings its text above this many characters."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """The settings that the samples depend on, besides the source and the tokenizer."""

    columns: Columns = field(default_factory=Columns)
    as_chat: bool | None = None
    """Whether pairs of texts become conversations. If None they do not, and the log says so."""
    prompt_template: str = "{prompt}"
    """Text around the prompt of a pair of texts."""
    date: str | None = None
    """Day that a chat template is told; None for today."""
    end_ids: tuple[int, ...] = ()
    """Tokens that the model's `generation_config.json` names as ends of an answer."""
    assistant_turns: str = "all"
    """`all` or `last`: the turns of a conversation that are learned."""
    max_length: int
    """Most tokens of a sample; longer ones are truncated."""
    limit: int | None = None
    """Rows to read, from the start and from every source alike; None reads all."""


def in_form(row: Row, form: Format) -> Row:
    """Return a row, as a conversation if it is a pair of texts and the settings say so."""
    if not isinstance(row, TextPair) or not form.as_chat:
        return row
    messages = [{"role": "user", "content": _prompt(row, form)}, {"role": "assistant", "content": row.completion}]
    return Conversation(messages=messages, where=row.where)


def _prompt(pair: TextPair, form: Format) -> str:
    return form.prompt_template.replace("{prompt}", pair.prompt)


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
    """Tokenize texts that continue other texts, without any special token.

    Special tokens that a text happens to spell stay text. Some tokenizers put a space before the start of every text.
    There is none before these texts, unless the text's own start and the newline before it would be one token.
    """

    def tokenize(given: list[str]) -> list[list[int]]:
        return tokenizer(given, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    plain = tokenize(texts)
    lead, word, after_lead = tokenize(["\n", "a", "\na"])
    if after_lead == lead + word:
        return plain
    return [
        ids[len(lead) :] if ids[: len(lead)] == lead else alone
        for ids, alone in zip(tokenize([f"\n{text}" for text in texts]), plain, strict=True)
    ]


class Encoder:
    """Encodes rows of either kind: pairs of texts and conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, form: Format) -> None:
        self._tokenizer = tokenizer
        self._form = form
        self._chat: ChatEncoder | None = None
        self.unlike_inference: list[str] = []
        """What the template shows otherwise than at inference, once for every conversation of which this is true."""
        self.asked_with: list[dict[str, Any]] = []
        """Variables of the generation prompts that the template does not write by default, once per conversation."""

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
        form = self._form
        if self._chat is None:
            self._chat = ChatEncoder(self._tokenizer, form.assistant_turns, form.date, form.end_ids)
        chat = self._chat
        rendered = [_rendered_or_refused(chat, conversation) for conversation in conversations]
        texts = [row for row in rendered if isinstance(row, Rendered)]
        self.unlike_inference += [row.unlike_inference for row in texts if row.unlike_inference]
        self.asked_with += [row.asked_with for row in texts if row.asked_with]
        encoded = chat.tokenize(texts) if texts else iter(())
        for row in rendered:
            yield row if isinstance(row, Refused) else next(encoded)

    def _pairs(self, pairs: list[TextPair]) -> Iterator[Encoded]:
        end = self._tokenizer.eos_token_id
        prompts = self._tokenizer([_prompt(pair, self._form) for pair in pairs], split_special_tokens=True)["input_ids"]
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
