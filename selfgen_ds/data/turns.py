"""Where a chat template puts what the assistant writes: the turns of a conversation, in characters of its text.

A turn is what generation would have to produce at its place. It starts where the text ends that the template gives to a
model that is to answer (the generation prompt), and after an empty block of reasoning, which templates write by
themselves. It ends with the special token that closes it; some templates close a turn by the next message's opening. If
the template has `{% generation %}` markers, only what they enclose is learned, and the closing token.

The text is compared with a second one, in which marks stand in place of the contents: both must be equal outside of the
contents. This finds a template that leaves out, changes, or repeats a message. Tool calls have no fixed form in the
text: they lie where the text changes if their arguments do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from selfgen_ds.data.chat_template import ChatTemplate, Span
from selfgen_ds.data.conversation import REASONING_FIELDS, Conversation, Message, change_calls
from selfgen_ds.errors import InputError

_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # from Unicode's private use area
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_OTHER = "8d1c7f-other"  # stands in arguments of tool calls, where templates may escape what is not ASCII
_THOUGHT = re.compile(r"(\s*(?:<think>\s*|\[THINK\]\s*)?)(.*?)(\s*(?:</think>|\[/THINK\]))(.*)", re.DOTALL)
_EMPTY_THOUGHT = re.compile(r"\s*(?:(?:<think>|\[THINK\])\s*)?(?:</think>|\[/THINK\])\s*")
_NO_THOUGHT = ({"enable_thinking": False}, {"thinking": False})
"""Variables with which templates write the generation prompt of an answer without reasoning."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The text of a conversation. Positions count characters, and spans come in the order of the text."""

    text: str
    contents: list[Span]
    """The contents and the reasoning of all messages."""
    turns: list[tuple[int, int, int]]
    """Start, end of the replaceable part, and end of each learned piece of a turn."""
    closed: bool
    """Whether a special token closes the last learned turn."""
    unlike_inference: str
    """What the template shows otherwise than at inference, in the first learned turn of which this is true."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A text that a message gives to the template."""

    message: int
    text: str
    reasoning: bool


def render(template: ChatTemplate, chat: Conversation, last_only: bool) -> Rendered:
    """Return the text of a conversation and its turns.

    Args:
        last_only: Whether only the last turn is learned.

    Raises:
        InputError: The template raises, or does not reproduce the messages. The message names the row.
    """
    text, generated = template.text_and_generated(chat)
    learned = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i not in chat.unlearned]
    learned = learned[-1:] if last_only else learned
    split = False
    try:
        parts, spans = _locate(template, chat, text, learned, split)
    except InputError:
        if not any(_THOUGHT.match(text) for message in chat.messages for text in _texts(message)):
            raise
        split = True
        parts, spans = _locate(template, chat, text, learned, split)
    _check_calls_and_tools(template, chat, text)
    turns: list[tuple[int, int, int]] = []
    closed, unlike_inference = True, ""
    for i in learned:
        turn = _Turn(template, chat, text, parts, spans, i, split)
        turns += turn.pieces(generated)
        closed, unlike_inference = turn.closed, unlike_inference or turn.unlike_inference
    if not closed and text[turns[-1][2] :].strip():
        raise InputError(f"{chat.where}: no special token closes the last turn, and text follows it")
    contents = sorted(spans.values())
    return Rendered(text=text, contents=contents, turns=turns, closed=closed, unlike_inference=unlike_inference)


def _locate(
    template: ChatTemplate, chat: Conversation, text: str, learned: list[int], split: bool
) -> tuple[list[_Part], dict[int, Span]]:
    """Return the parts of all messages and, by their numbers, the spans in the text of those that it shows.

    Args:
        learned: The messages that are learned, whose reasoning must be shown, at least before messages follow.
        split: Whether reasoning inside of contents is a part of its own, because the template treats it apart.

    Raises:
        InputError: The template leaves out, changes, or repeats a part. It may leave out what it shows of an answer
            that no message follows, such as reasoning.
    """
    parts: list[_Part] = []
    marked = [_marked(message, i, split, parts) for i, message in enumerate(chat.messages)]
    marked_chat = replace(chat, messages=marked)
    pieces = _MARK.split(template.text(marked_chat))
    order = [int(number) for number in pieces[1::2]]
    for number in sorted(set(range(len(parts))) - set(order)):
        index = parts[number].message
        if parts[number].reasoning and index not in learned:
            continue
        then = template.text_or_none(marked_chat.until(index + 1)) or ""  # an answer, before messages follow it
        if chat.messages[index]["role"] != "assistant" or f"{_OPEN}{number}{_CLOSE}" not in then:
            what = "the reasoning of message" if parts[number].reasoning else "message"
            raise InputError(f"{chat.where}: the chat template leaves out {what} {index + 1}")
    repeated = len(set(order)) < len(order) or not set(order) <= set(range(len(parts)))
    spans = None if repeated else _spans([parts[i].text for i in order], pieces[::2], text)
    if spans is None:
        raise InputError(f"{chat.where}: the chat template does not reproduce the messages as they are")
    return parts, dict(zip(order, spans, strict=True))


def _texts(message: Message) -> list[str]:
    """Return the texts of a message's content."""
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _marked(message: Message, index: int, split: bool, parts: list[_Part]) -> Message:
    """Return a message with marks in place of its texts, and add these texts to `parts`."""

    def mark(text: str, reasoning: bool = False) -> str:
        if not text:
            return text
        parts.append(_Part(message=index, text=text, reasoning=reasoning))
        return f"{_OPEN}{len(parts) - 1}{_CLOSE}"

    def mark_content(text: str) -> str:
        thought = _THOUGHT.match(text) if split and message["role"] == "assistant" else None
        if thought is None:
            return mark(text)
        opening, reasoning, closing, answer = thought.groups()
        return opening + mark(reasoning, True) + closing + mark(answer)

    reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name)), "")
    fields: Message = dict.fromkeys([name for name in REASONING_FIELDS if message.get(name)], mark(reasoning, True))
    content = message.get("content")
    if isinstance(content, str):
        fields["content"] = mark_content(content)
    elif content:
        fields["content"] = [part | {"text": mark_content(part["text"])} for part in content]
    return message | fields


def _spans(texts: list[str], pieces: list[str], text: str) -> list[Span] | None:
    """Return the spans of parts in a text `piece part piece ... piece`; None if the text has another form."""
    spans = []
    position = 0
    for part, before, after in zip(texts, pieces[:-1], pieces[1:], strict=True):
        start = position + len(before)
        end = _end_of(part, text, start, after) if text.startswith(before, position) else None
        if end is None:
            return None
        spans.append((start, end))
        position = end
    return spans if text[position:] == pieces[-1] else None


def _end_of(part: str, text: str, start: int, after: str) -> int | None:
    """Find the end of a part that starts at `start`. The template may strip outer white space of the part."""
    core = part.strip()
    lead, trail = part.split(core, 1) if core else (part, "")
    for stripped in range(len(lead) + 1):
        if text.startswith(lead[stripped:] + core, start):
            end = start + len(lead) - stripped + len(core)
            for kept in range(len(trail), -1, -1):
                if text.startswith(trail[:kept] + after, end):
                    return end + kept
    return None


def _check_calls_and_tools(template: ChatTemplate, chat: Conversation, text: str) -> None:
    """Check that the text depends on every tool call and on the tools, and that none of them spells a special token.

    Raises:
        InputError: A call or the tools are left out, or the text would hold a special token that they spell.
    """
    calls = [message.get("tool_calls") for message in chat.messages]
    for string in _strings([calls, chat.tools]):
        if spelled := template.special.search(string):
            raise InputError(f"{chat.where}: a tool call or a tool spells the special token {spelled[0]!r}")
    if chat.tools and template.text_or_none(replace(chat, tools=None)) == text:
        raise InputError(f"{chat.where}: the chat template leaves out the tools")
    for i, message in enumerate(chat.messages):
        for j in range(len(message.get("tool_calls") or ())):
            other = chat.with_message(i, change_calls(message, _other_arguments, only=j))
            if template.text_or_none(other) == text:
                raise InputError(f"{chat.where}: the chat template leaves out tool call {j + 1} of message {i + 1}")


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in a value of JSON, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value, *value.values()])
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _other_arguments(function: dict[str, Any]) -> dict[str, Any]:
    other: Any = {_OTHER: _OTHER}
    return function | {"arguments": json.dumps(other) if isinstance(function.get("arguments"), str) else other}


def _other_name(function: dict[str, Any]) -> dict[str, Any]:
    return function | {"name": _OTHER}


def _common_start(one: str, other: str) -> int:
    """Return the number of characters at the start of two texts that are the same."""
    differing = (i for i, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differing, min(len(one), len(other)))


def _common_end(one: str, other: str) -> int:
    """Return the number of characters at the end of two texts that are the same."""
    return _common_start(one[::-1], other[::-1])


class _Turn:
    """A learned turn of the assistant in the text of a conversation.

    Args:
        parts: The texts that the messages give.
        spans: Number of a part -> its span in the text, if the text shows it.
        index: The index of the turn's message.
        split: Whether reasoning inside of contents is a part of its own.
    """

    def __init__(
        self,
        template: ChatTemplate,
        chat: Conversation,
        text: str,
        parts: list[_Part],
        spans: dict[int, Span],
        index: int,
        split: bool,
    ) -> None:
        self._template, self._chat, self._text, self._index, self._split = template, chat, text, index, split
        self._message = chat.messages[index]
        self._where = f"{chat.where}, message {index + 1}"
        by_message = [(parts[number].message, span) for number, span in spans.items()]
        self._own = sorted(span for message, span in by_message if message == index)
        self._floor = max((end for message, (_, end) in by_message if message < index), default=0)
        self._ceiling = min((start for message, (start, _) in by_message if message > index), default=len(text))
        self._hidden = any(part.message == index and number not in spans for number, part in enumerate(parts))
        self._context_is_shown = False  # whether the text is known to start with what the model is given at inference
        self.first, self.last = self._written()
        if any(self.first < start < self.last for message, (start, _) in by_message if message != index):
            raise InputError(f"{self._where}: the chat template writes another message in the midst of it")
        self.start = self._start()
        self.content_end, self.end = self._closing()
        self.closed = self.content_end < self.end
        """Whether a special token closes the turn."""

    def pieces(self, generated: list[Span] | None) -> list[tuple[int, int, int]]:
        """Return the learned pieces of the turn: start, end of the replaceable part, and end.

        Args:
            generated: The spans inside the template's generation markers, if it has any.

        Raises:
            InputError: The markers leave out a part of the message.
        """
        if generated is None:
            return [(self.start, self.content_end, self.end)]
        inside = [
            (max(start, self.start), end)
            for start, end in generated
            if start < self._ceiling and self.start < end and self._floor <= start
        ]
        if not inside or any(not _covered(span, inside) for span in self._own or [(self.first, self.last)]):
            raise InputError(f"{self._where}: the chat template's generation markers do not enclose it")
        pieces = [(start, min(end, max(start, self.content_end)), end) for start, end in _joined(inside)]
        start, middle, end = pieces[-1]
        return [*pieces[:-1], (start, middle, self.end if end >= self.content_end else end)]

    @property
    def unlike_inference(self) -> str:
        """What the template shows otherwise than at inference; empty if nothing."""
        if self._hidden:
            return f"{self._where}: the text does not show all of it, because messages follow"
        if self._context_is_shown:
            return ""
        before = self._chat.until(self._index)
        shown = [self._template.text_or_none(before, generation_prompt) for generation_prompt in (True, False)]
        if any(text is not None and self._text.startswith(text) for text in shown) or shown == [None, None]:
            return ""
        return f"{self._where}: the messages before it look otherwise than when it is generated"

    def _written(self) -> Span:
        """Return where the text starts and ends to depend on the message."""
        first, last = (self._own[0][0], self._own[-1][1]) if self._own else (len(self._text), 0)
        if self._message.get("tool_calls"):
            for change in (_other_arguments, _other_name):
                other = self._template.text_or_none(self._with_calls(change))
                if other is not None:
                    first = min(first, _common_start(self._text, other))
                    if change is _other_arguments:
                        last = max(last, len(self._text) - _common_end(self._text, other))
        return first, last

    def _with_calls(self, change: Any) -> Conversation:
        return self._chat.with_message(self._index, change_calls(self._message, change))

    def _start(self) -> int:
        """Return the end of the generation prompt, or of an empty block of reasoning after it."""
        position = self._after_prompt(cut=True)
        start = self.first if position is None else position
        if self._text[start : self.first].strip():
            without = [self._after_prompt(cut=False, **variables) for variables in _NO_THOUGHT]
            start = max([start, *(position for position in without if position is not None)])
        empty = _EMPTY_THOUGHT.match(self._text, start, self.first)
        return empty.end() if empty else start

    def _after_prompt(self, cut: bool, **variables: Any) -> int | None:
        """Return where the generation prompt ends in the text, or None if it is not there.

        Args:
            cut: Whether the text may have a part of the prompt, because the prompt also opens a block of reasoning.
            variables: Given to the template.
        """
        before = self._chat.until(self._index)
        prompt = self._template.text_or_none(before, True, **variables)
        if prompt is None:
            return None
        as_it_is = self._floor <= len(prompt) <= self.first and self._text.startswith(prompt)
        if as_it_is and self._template.knows_generation_prompt:
            self._context_is_shown = True
            return len(prompt)
        without = self._template.text_or_none(before, False, **variables) or ""
        opening = prompt[len(without) :] if prompt.startswith(without) else prompt[_common_start(prompt, without) :]
        if not opening and not self._template.knows_generation_prompt:
            opening = self._header(before, prompt)
            prompt += opening
        if self._text.startswith(prompt) and self._floor <= len(prompt) <= self.first:
            return len(prompt)
        special = self._template.special.search(opening)
        shortest = special.end() if special and cut else len(opening)
        for length in range(len(opening), shortest - 1, -1):
            position = self._text.rfind(opening[:length], self._floor, self.first) if length else -1
            if position >= 0:
                return position + length
        return None

    def _header(self, before: Conversation, text: str) -> str:
        """Return what the template writes before an answer after some messages; nothing if that is white space."""
        mark = f"{_OPEN}0{_CLOSE}"
        answer = {"role": "assistant", "content": mark}
        answered = self._template.text_or_none(replace(before, messages=[*before.messages, answer])) or ""
        header = answered[len(text) : answered.find(mark)] if answered.startswith(text) and mark in answered else ""
        return header if header.strip() else ""

    def _closing(self) -> Span:
        """Return where the special token that closes the turn starts, and where it ends; twice the same without one."""
        directly = self._template.closing.match(self._text, self.last)
        if directly and not self._message.get("tool_calls"):
            return self.last, directly.end()
        after = self._text[self.last :]
        alone = self._template.text_or_none(self._chat.until(self._index + 1))
        other = self._template.text_or_none(self._changed().until(self._index + 1))
        if alone is not None and other is not None:  # what the template writes after the message, whatever follows it
            after = after[: _common_start(after, alone[len(alone) - _common_end(alone, other) :])]
        if closing := self._template.closing_at_end.search(after):
            return self.last + closing.start(1), self.last + closing.end(1)
        content_end = self.last + len(after.rstrip())
        opening = self._template.closing.match(self._text, content_end)  # that of the next message
        return content_end, opening.end() if opening else content_end

    def _changed(self) -> Conversation:
        """Return the conversation with other texts and tool calls in the message."""
        message = change_calls(_marked(self._message, self._index, self._split, []), _other_arguments)
        return self._chat.with_message(self._index, message)


def _joined(spans: list[Span]) -> list[Span]:
    """Join spans that touch each other."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _covered(span: Span, by: list[Span]) -> bool:
    """Return whether one of some spans, joined where they touch, holds a whole span."""
    return any(start <= span[0] and span[1] <= end for start, end in _joined(by))
