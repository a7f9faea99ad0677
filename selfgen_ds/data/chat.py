"""Encoding of conversations with the tokenizer's chat template, and the positions of the assistant's turns.

The token ids equal those of `tokenizer.apply_chat_template(messages)` or, if a message spells a special token, those of
`apply_chat_template(messages, sanitize_control_tokens=True)`. The turns come from the template's `{% generation %}`
markers if the template has them. Otherwise a turn is a message's content and the special token that closes the content.

In both cases the template is rendered a second time with a mark in place of each content. The text between the marks
must equal the text between the contents. This check finds a template that leaves out, changes, or repeats a message.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import itemgetter
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from selfgen_ds.errors import InputError

_BESIDE_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # other fields that a turn may hold
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # from Unicode's private use area
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can express a lone surrogate, UTF-8 cannot
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One example in `messages` form."""

    messages: list[dict[str, Any]]
    given: int = 0
    """Number of messages at the start that are the prompt. The assistant's turns among them are not learned."""
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables that are passed to the template."""
    where: str = ""
    """The file and line that the conversation was read from."""


class ChatEncoder:
    """Encoder of conversations with a tokenizer's chat template.

    Args:
        assistant_turns: Which of the assistant's turns are learned: `all` or `last`.

    Raises:
        InputError: The tokenizer has no chat template, or gives no character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_turns: str) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                "model.tokenizer: rows of messages need a tokenizer with a chat template (`chat_template.jinja`)"
            )
        if not tokenizer.is_fast:
            raise InputError("model.tokenizer: rows of messages need a fast tokenizer (of the library `tokenizers`)")
        self._tokenizer = tokenizer
        self._last_only = assistant_turns == "last"
        special = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len)
        spelled = "|".join(map(re.escape, reversed(special))) or "(?!)"
        self._special, self._closing = re.compile(spelled), re.compile(rf"\s*(?:{spelled})")

    def encode(self, conversations: list[Conversation]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yield each conversation's token ids and turns. A turn is `[start, end of replaceable part, end]`, in tokens.

        Text that a template generates before a turn's content becomes a turn of its own, without a replaceable part.

        Raises:
            InputError: The template raises, or does not reproduce the messages. The message names the row.
        """
        texts, contents, turns = zip(*map(self._render, conversations), strict=True)
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        encodings = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for text, spans, of_row, (ids, offsets) in zip(texts, contents, turns, encodings, strict=True):
            if spelled := [match.span() for span in spans for match in self._special.finditer(text, *span)]:
                ids, offsets = self._encode_with_plain(text, spelled)
            yield ids, [_tokens_of(turn, offsets) for turn in of_row]

    def between_answers(self, request: str, setting: str) -> tuple[list[int], list[int]]:
        """Return the tokens that close an assistant's turn, and the tokens from there to the content of the next turn.

        Args:
            request: The content of the user's turn between the two turns.
            setting: The name of the setting that gave the request, for errors.

        Raises:
            InputError: The template raises, or does not reproduce the request, or does not accept an empty request.
        """

        def exchange(content: str) -> Conversation:
            contents = {"user": "What is it?", "assistant": "This is the answer"}
            messages = [{"role": role, "content": contents[role]} for role in ("user", "assistant") * 2]
            messages[2]["content"] = content
            return Conversation(
                messages=messages, where=f"{setting}, as message 3 of question, answer, cue, correction"
            )

        chat = exchange(request)
        if not request:  # an empty content cannot be found in the text, so `_render` does not check it
            marked = exchange(f"{_OPEN}2{_CLOSE}")
            if _MARK.sub("", self._apply(marked.messages, marked)[0]) != self._apply(chat.messages, chat)[0]:
                raise InputError(f"{setting}: the chat template takes no empty turn of the user")
        ((ids, turns),) = self.encode([chat])
        # A turn without a replaceable part is text that the template generates before a content.
        (_, content_end, end), (start, _, _) = [turn for turn in turns if turn[0] < turn[1]]
        return ids[content_end:end], ids[end:start]

    def _render(self, chat: Conversation) -> tuple[str, list[tuple[int, int]], list[tuple[int, int, int]]]:
        """Return a conversation's text, the spans of the messages' contents, and the learned turns, in characters.

        Spans and turns come in the order of the text. A turn is its start, the end of its replaceable part, and its end
        (see `encode`).
        """
        messages = chat.messages
        marked = [m | {"content": f"{_OPEN}{i}{_CLOSE}"} if m.get("content") else m for i, m in enumerate(messages)]
        text, generated = self._apply(messages, chat)
        pieces = _MARK.split(self._apply(marked, chat)[0])
        order = [int(number) for number in pieces[1::2]]
        expected = [i for i, message in enumerate(messages) if message.get("content")]
        if missing := set(expected) - set(order):
            raise InputError(f"{chat.where}: the chat template leaves out message {min(missing) + 1}")
        once = sorted(order) == expected
        spans = _content_spans([messages[i]["content"] for i in order], pieces[::2], text) if once else None
        if spans is None:
            raise InputError(f"{chat.where}: the chat template does not reproduce the messages as they are")
        for part, without_part in _without_each_part(chat):
            if self._renders_to(text, without_part):
                raise InputError(f"{chat.where}: the chat template leaves out {part}")
        return text, spans, self._turns(chat, dict(zip(order, spans, strict=True)), text, generated)

    def _renders_to(self, text: str, chat: Conversation) -> bool:
        try:
            return self._apply(chat.messages, chat)[0] == text
        except InputError:  # a template that raises without the part does not ignore the part
            return False

    def _apply(self, messages: list[dict[str, Any]], chat: Conversation) -> tuple[str, list[tuple[int, int]] | None]:
        """Return the text, and the spans of characters inside the template's generation markers if it has any."""
        try:
            template = self._tokenizer.get_chat_template(tools=chat.tools)
            with_markers = _GENERATION.search(template) is not None
            texts, generated = render_jinja_template(
                [messages],
                tools=chat.tools,
                chat_template=template,
                return_assistant_tokens_mask=with_markers,
                **self._tokenizer.special_tokens_map | chat.template_kwargs,
            )
        except Exception as error:  # a template can raise anything
            raise InputError(f"{chat.where}: the chat template raises: {' '.join(str(error).split())}") from error
        if not texts[0].isascii() and SURROGATE.search(texts[0]):
            raise InputError(f"{chat.where}: expected UTF-8 text, got half a surrogate pair")
        return texts[0], generated[0] if with_markers else None

    def _turns(
        self,
        chat: Conversation,
        contents: dict[int, tuple[int, int]],
        text: str,
        generated: list[tuple[int, int]] | None,
    ) -> list[tuple[int, int, int]]:
        """Find the learned turns in the text, in characters."""
        assistant = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if generated is not None and len(generated) != len(assistant):
            raise InputError(
                f"{chat.where}: the chat template marks {len(generated)} generations, the row has {len(assistant)} "
                "turns of the assistant"
            )
        learned = [(number, i) for number, i in enumerate(assistant) if i >= chat.given]
        turns = []
        for number, i in learned[-1:] if self._last_only else learned:
            message, where = chat.messages[i], f"{chat.where}, message {i + 1}"
            if generated is None:
                # Without markers, the position of such a field in the text is unknown.
                if beside := [name for name in _BESIDE_CONTENT if message.get(name)]:
                    raise InputError(f"{where}: {beside[0]} needs a chat template with generation markers")
                start, end = contents[i]
                closing = self._closing.match(text, end)
                turns.append((start, end, closing.end() if closing else end))
            else:
                first, last = generated[number]
                # A turn without content, such as a tool call, has no replaceable part.
                start, end = contents.get(i, (first, first))
                if not first <= start <= end <= last:
                    raise InputError(f"{where}: the chat template's generation markers do not enclose it")
                if first < start:
                    turns.append((first, first, start))
                turns.append((start, end, last))
        return turns

    def _encode_with_plain(self, text: str, spelled: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids and offsets of a text in which the special tokens at the spans `spelled` are plain text."""
        line_end = self._tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        edges = [0, *(edge for span in spelled for edge in span), len(text)]
        for number, (start, end) in enumerate(pairwise(edges)):
            if start == end:
                continue
            # Some tokenizers put a space before the start of a text. A newline before the piece prevents that, unless
            # the newline becomes one token with the text after it.
            for lead in ("\n", "") if number else ("",):
                piece = self._tokenizer(
                    lead + text[start:end],
                    add_special_tokens=False,
                    split_special_tokens=number % 2 == 1,
                    return_offsets_mapping=True,
                )
                skipped = len(line_end) if lead else 0
                if piece["input_ids"][:skipped] == line_end[:skipped]:
                    break
            ids += piece["input_ids"][skipped:]
            shift = start - len(lead)
            offsets += [(first + shift, last + shift) for first, last in piece["offset_mapping"][skipped:]]
        return ids, offsets


def _without_each_part(chat: Conversation) -> Iterator[tuple[str, Conversation]]:
    """Yield each part, other than contents, that a template must not leave out, and the conversation without that part.

    Reasoning counts in the last message only, because some templates leave out earlier reasoning by design.
    """
    if chat.tools:
        yield "the tools", replace(chat, tools=None)
    last = len(chat.messages) - 1
    for i, message in enumerate(chat.messages):
        for name in _BESIDE_CONTENT:
            if message.get(name) and (name == "tool_calls" or i == last):
                messages = [m if j != i else m | {name: None} for j, m in enumerate(chat.messages)]
                messages[i] = {key: value for key, value in messages[i].items() if value is not None}
                yield f"{name} of message {i + 1}", replace(chat, messages=messages)


def _content_spans(contents: list[str], pieces: list[str], text: str) -> list[tuple[int, int]] | None:
    """Return the spans of the contents in a text `piece content piece ... piece`; None if the text has another form."""
    spans = []
    position = 0
    for content, before, after in zip(contents, pieces[:-1], pieces[1:], strict=True):
        start = position + len(before)
        end = _content_end(content, text, start, after) if text.startswith(before, position) else None
        if end is None:
            return None
        spans.append((start, end))
        position = end
    return spans if text[position:] == pieces[-1] else None


def _content_end(content: str, text: str, start: int, after: str) -> int | None:
    """Find the end of a content that starts at `start`. The template may strip outer white space of the content."""
    core = content.strip()
    lead, trail = content.split(core, 1) if core else (content, "")
    for stripped in range(len(lead) + 1):
        if text.startswith(lead[stripped:] + core, start):
            end = start + len(lead) - stripped + len(core)
            for kept in range(len(trail), -1, -1):
                if text.startswith(trail[:kept] + after, end):
                    return end + kept
    return None


def _tokens_of(turn: tuple[int, int, int], offsets: list[tuple[int, int]]) -> list[int]:
    """Convert a turn from characters to tokens. A token that extends past the content is not replaceable."""
    start, content_end, end = turn
    first = bisect_right(offsets, start, key=itemgetter(1))
    last = bisect_left(offsets, end, lo=first, key=itemgetter(0))
    replaceable = bisect_right(offsets, content_end, lo=first, key=itemgetter(1))
    return [first, min(replaceable, last), last]
