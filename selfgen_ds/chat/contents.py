"""Where a chat template puts what the messages of a conversation say, in characters of its text.

The text is compared with a second one, in which marks stand in place of the contents: between the contents, both must
be equal. This finds a template that leaves out a message, or that changes or repeats what is to be learned. What is not
learned may be escaped or repeated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from selfgen_ds.chat.conversation import (
    REASONING_FIELDS,
    TOOL_ROLES,
    Conversation,
    Message,
    are_parts,
    change_calls,
    result_of,
)
from selfgen_ds.chat.template import ChatTemplate, Span
from selfgen_ds.errors import InputError

_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # from Unicode's private use area
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_OTHER = "8d1c7f-other"  # stands in tool calls, where templates may escape what is not ASCII
_AS_PYTHON, _AS_TEXT = f"{{'{_OTHER}'", f'\\"{_OTHER}'
"""What a template writes if it prints an object as Python does, or makes JSON of what is JSON already."""
THOUGHT = re.compile(r"(\s*(?:<think>\s*|\[THINK\]\s*)?)(.*?)(\s*(?:</think>|\[/THINK\]))(.*)", re.DOTALL)
"""Reasoning inside of a content: what opens it, the reasoning, what closes it, and the answer."""


_MARKED_BLANK = ("user", *TOOL_ROLES)
"""Roles whose blank contents get a mark: the answer to an empty result starts after it."""


@dataclass(frozen=True, kw_only=True)
class Marking:
    """Which texts of messages get a mark of their own."""

    thoughts: bool = False
    """Whether reasoning in a content of the assistant is a part of its own, because the template treats it apart."""
    blanks: bool = True
    """Whether an empty or blank content of the user or a tool gets a mark, so that its place is known. Some templates
    write such a message otherwise."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A text that a message gives to the template: its content, a part of it, or its reasoning."""

    message: int
    text: str
    reasoning: bool = False


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The parts of all messages, and where the text shows them."""

    parts: list[Part]
    shown: list[tuple[int, Span]]
    """Number of a part and its place, in the order of the text."""
    marking: Marking
    """The marks with which the parts were found."""

    def of(self, message: int) -> list[Span]:
        """Return the places of a message's parts."""
        return [span for number, span in self.shown if self.parts[number].message == message]

    def hides(self, message: int) -> bool:
        """Return whether the text leaves out a part of a message that is not blank."""
        shown = {number for number, _ in self.shown}
        missing = (part for number, part in enumerate(self.parts) if number not in shown)
        return any(part.message == message and part.text.strip() for part in missing)


def check_shown(template: ChatTemplate, chat: Conversation) -> None:
    """Check that the text of a conversation shows its contents, tool calls and tools.

    Raises:
        InputError: The template raises, or leaves out one of them. The message names the row.
    """
    text = template.text(chat)
    locate(template, chat, text, [])
    check_other_fields(template, chat, text)


def locate(template: ChatTemplate, chat: Conversation, text: str, learned: list[int]) -> Contents:
    """Find the parts of all messages in the text of a conversation.

    Args:
        learned: Indices of the messages that are learned. The text must show them once and as they are, at least
            before messages follow. It may escape or repeat what other messages say.

    Raises:
        InputError: The template leaves out a part, or changes or repeats one that is learned.
    """
    texts = [(message["role"], part) for message in chat.messages for part in texts_of(message) or [""]]
    thinks = any(role == "assistant" and THOUGHT.match(part) for role, part in texts)
    has_blanks = any(role in _MARKED_BLANK and not part.strip() for role, part in texts)
    problems = []
    for thoughts in (False, True)[: 1 + thinks]:
        for blanks in (True, False)[: 1 + has_blanks]:
            try:
                return _locate(template, chat, text, learned, Marking(thoughts=thoughts, blanks=blanks))
            except InputError as problem:
                problems.append(problem)
    raise problems[-1 - has_blanks]  # with all marks, which says most precisely what is left out


def _locate(template: ChatTemplate, chat: Conversation, text: str, learned: list[int], marking: Marking) -> Contents:
    """Find the parts with marks of one kind."""
    parts: list[Part] = []
    marked_chat = replace(chat, messages=[_marked(m, i, marking, parts) for i, m in enumerate(chat.messages)])
    pieces = _MARK.split(template.text(marked_chat))
    order = [int(number) for number in pieces[1::2]]
    _check_shown(template, marked_chat, parts, order, learned)
    strict = [i for i in order if i >= len(parts) or parts[i].message in learned]
    repeated = len(set(strict)) < len(strict) or any(i >= len(parts) for i in strict)
    shown = [] if repeated else [(parts[i].text, parts[i].message in learned) for i in order]
    spans = None if repeated else _spans(shown, pieces[::2], text)
    if spans is None:
        raise InputError(f"{chat.where}: the chat template does not reproduce the messages as they are")
    places = [*zip(order, spans, strict=True), *_results(template, chat, text, parts)]
    return Contents(parts=parts, shown=sorted(places, key=lambda place: place[1]), marking=marking)


def _results(template: ChatTemplate, chat: Conversation, text: str, parts: list[Part]) -> Iterator[tuple[int, Span]]:
    """Yield the places of results that are objects, by another one in their place, and add them to `parts`.

    Raises:
        InputError: The template leaves out a result.
    """
    for i, message in enumerate(chat.messages):
        if (result := result_of(message)) is None:
            continue
        other: Any = {_OTHER: _OTHER} if isinstance(result, dict) else [_OTHER]
        changed = template.text_or_none(chat.with_message(i, message | {"content": other}))
        if changed == text:
            raise InputError(f"{chat.where}: the chat template leaves out the content of message {i + 1}")
        if changed is not None:
            yield len(parts), (common_start(text, changed), len(text) - common_end(text, changed))
            parts.append(Part(message=i, text=""))


def _check_shown(
    template: ChatTemplate, marked_chat: Conversation, parts: list[Part], order: list[int], learned: list[int]
) -> None:
    """Check that no part is left out. Blank parts may be, and reasoning that is not learned.

    The text of the whole conversation may leave out what the assistant says, if it is shown before messages follow.
    """
    for number in sorted(set(range(len(parts))) - set(order)):
        index, reasoning = parts[number].message, parts[number].reasoning
        if not parts[number].text.strip() or (reasoning and index not in learned):
            continue
        message = marked_chat.messages[index]
        then = template.text_or_none(marked_chat.until(index + 1)) or ""
        if message["role"] != "assistant" or f"{_OPEN}{number}{_CLOSE}" not in then:
            what, advice = "the content", ""
            if reasoning:
                what = "the reasoning"
                advice = "; write it into the content as <think>...</think>, or bring a template that keeps it"
            raise InputError(f"{marked_chat.where}: the chat template leaves out {what} of message {index + 1}{advice}")


def other_message(message: Message, index: int, marking: Marking) -> Message:
    """Return a message with other texts and other arguments of tool calls than it has."""
    marked = _marked(message, index, marking, [])
    if not message.get("tool_calls") and not any(text.strip() for text in texts_of(message)):
        marked = marked | {"content": f"{_OPEN}0{_CLOSE}"}  # a blank content has no mark
    return change_calls(marked, other_arguments)


def other_arguments(function: dict[str, Any], number: int = 0) -> dict[str, Any]:
    """Return a function of a tool call with arguments that no row has, in the form of its own."""
    arguments = {_OTHER: f"{_OTHER}{number}-"}
    is_text = isinstance(function.get("arguments"), str)
    return function | {"arguments": json.dumps(arguments) if is_text else arguments}


def other_name(function: dict[str, Any]) -> dict[str, Any]:
    """Return a function of a tool call with a name that no row has."""
    return function | {"name": _OTHER}


def tail_after_contents(template: ChatTemplate, chat: Conversation, marking: Marking, **variables: Any) -> str | None:
    """Return what the template writes from the last content of a conversation to the model's answer.

    None if the template raises, or shows no content.

    Args:
        variables: Given to the template.
    """
    marked = [_marked(m, i, replace(marking, thoughts=False), []) for i, m in enumerate(chat.messages)]
    text = template.text_or_none(replace(chat, messages=marked), True, **variables)
    return None if text is None or _CLOSE not in text else text[text.rindex(_CLOSE) + 1 :]


def header_of_answer(template: ChatTemplate, chat: Conversation, text: str) -> str:
    """Return what the template writes before an answer to some messages; nothing if that is white space.

    Args:
        text: The text of these messages.
    """
    mark = f"{_OPEN}0{_CLOSE}"
    answer = {"role": "assistant", "content": mark}
    answered = template.text_or_none(replace(chat, messages=[*chat.messages, answer])) or ""
    header = answered[len(text) : answered.find(mark)] if answered.startswith(text) and mark in answered else ""
    return header if header.strip() else ""


def texts_of(message: Message) -> list[str]:
    """Return the texts of a message's content."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content] if are_parts(content) else []


def _marked(message: Message, index: int, marking: Marking, parts: list[Part]) -> Message:
    """Return a message with marks in place of its texts, and add these texts to `parts`."""
    with_blanks = marking.blanks and message["role"] in _MARKED_BLANK

    def mark(text: str, reasoning: bool = False) -> str:
        if not text.strip() and not with_blanks:
            return text
        parts.append(Part(message=index, text=text, reasoning=reasoning))
        return f"{_OPEN}{len(parts) - 1}{_CLOSE}"

    def mark_content(text: str) -> str:
        thought = THOUGHT.match(text) if marking.thoughts and message["role"] == "assistant" else None
        if thought is None:
            return mark(text)
        opening, reasoning, closing, answer = thought.groups()
        return opening + mark(reasoning, True) + closing + mark(answer)

    reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name)), "")
    fields: Message = dict.fromkeys([name for name in REASONING_FIELDS if message.get(name)], mark(reasoning, True))
    content = message.get("content")
    if isinstance(content, str):
        fields["content"] = mark_content(content)
    elif are_parts(content):
        fields["content"] = [part | {"text": mark_content(part["text"])} for part in content]
    return message | fields


def _spans(parts: list[tuple[str, bool]], pieces: list[str], text: str) -> list[Span] | None:
    """Return the spans of parts in a text `piece part piece ... piece`; None if the text has another form.

    Args:
        parts: The text of each part, and whether the text must show it as it is.
    """
    spans = []
    position = 0
    for (part, as_it_is), before, after in zip(parts, pieces[:-1], pieces[1:], strict=True):
        start = position + len(before)
        if not text.startswith(before, position):
            return None
        end = _end_of(part, text, start, after)
        if end is None and not as_it_is:
            end = _end_of(json.dumps(part, ensure_ascii=False)[1:-1], text, start, after)
        if end is None and not as_it_is:  # escaped in a way of the template's own
            end = text.find(after, start) if after else len(text)
        if end is None or end < 0:
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


def check_other_fields(template: ChatTemplate, chat: Conversation, text: str) -> None:
    """Check what messages hold beside their contents: tool calls, names and the like, and the tools.

    Raises:
        InputError: The text does not depend on a tool call or on the tools, or shows a call's arguments otherwise than
            as JSON, or a field spells a special token, which would become one.
    """
    contents = {"role", "content", *REASONING_FIELDS}
    fields: dict[str, Any] = {
        f"message {i}, {name}": value
        for i, message in enumerate(chat.messages, start=1)
        for name, value in message.items()
        if name not in contents
    }
    for place, value in (fields | {"tools": chat.tools}).items():
        for string in _strings(value):
            spelled = template.special.search(string)
            if spelled and (string in text or json.dumps(string, ensure_ascii=False)[1:-1] in text):
                raise InputError(f"{chat.where}, {place}: it spells the special token {spelled[0]!r}")
    if chat.tools and template.text_or_none(replace(chat, tools=None)) == text:
        raise InputError(f"{chat.where}: the chat template leaves out the tools")
    _check_calls(template, chat)


def _check_calls(template: ChatTemplate, chat: Conversation) -> None:
    """Check that the text shows every tool call, by its arguments, as JSON.

    Raises:
        InputError: It does not. The message names the call.
    """
    numbers = count()
    places: list[str] = []

    def numbered(function: dict[str, Any]) -> dict[str, Any]:
        return other_arguments(function, next(numbers))

    for i, message in enumerate(chat.messages, start=1):
        calls = len(message.get("tool_calls") or ())
        places += [f"tool call {j} of message {i}" for j in range(1, calls + 1)]
    text = template.text_or_none(replace(chat, messages=[change_calls(m, numbered) for m in chat.messages]))
    if text is None:
        return
    if places and (_AS_PYTHON in text or _AS_TEXT in text):
        raise InputError(f"{chat.where}: the chat template does not show the arguments of {places[0]} as JSON")
    for number, place in enumerate(places):
        if f"{_OTHER}{number}-" not in text:
            raise InputError(f"{chat.where}: the chat template leaves out {place}")


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in a value of JSON, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value, *value.values()])
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def common_start(one: str, other: str) -> int:
    """Return the number of characters at the start of two texts that are the same."""
    return _longest(min(len(one), len(other)), lambda length: one[:length] == other[:length])


def common_end(one: str, other: str) -> int:
    """Return the number of characters at the end of two texts that are the same."""
    shorter = min(len(one), len(other))
    return _longest(shorter, lambda length: one[len(one) - length :] == other[len(other) - length :])


def _longest(most: int, same: Callable[[int], bool]) -> int:
    """Return the largest length up to `most` that is the same, by halving."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if same(middle) else (low, middle - 1)
    return low
