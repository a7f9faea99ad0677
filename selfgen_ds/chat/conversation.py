"""Conversations, and the forms in which chat templates take the same messages."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

Message = dict[str, Any]

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names of the field with a message's reasoning. Transformers gives a template all of them."""
TOOL_ROLES = ("tool", "function", "ipython")
"""The roles of a message that holds the result of a tool call."""
_Change = Callable[[Message], Message]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One example in `messages` form."""

    messages: list[Message]
    unlearned: frozenset[int] = frozenset()
    """Indices of messages of the assistant that are not learned: those of the prompt, and those of weight 0."""
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables that are passed to the template."""
    where: str = ""
    """The file and line that the conversation was read from."""

    def with_message(self, index: int, message: Message) -> Conversation:
        """Return the conversation with another message in one place."""
        return replace(self, messages=[*self.messages[:index], message, *self.messages[index + 1 :]])

    def until(self, end: int) -> Conversation:
        """Return the conversation of the first messages."""
        return replace(self, messages=self.messages[:end])


def forms(form: int, chat: Conversation) -> Iterator[tuple[int, Conversation]]:
    """Yield a conversation in every form that a template may take it in, with the form's number.

    Contents are texts or lists of parts, arguments of tool calls and results are objects or JSON, a missing content is
    left out, null or empty, and `developer` and `function` may be called `system` and `tool`.

    Args:
        form: The number of the form to begin with. Number 0 is the form that the row has.
    """
    tried: list[list[Message]] = []
    for number in dict.fromkeys((form, *range(len(_FORMS)))):
        messages = chat.messages
        for change in _FORMS[number]:
            messages = [change(message) for message in messages]
        if messages not in tried:
            tried.append(messages)
            yield number, replace(chat, messages=messages)


def change_calls(message: Message, change: _Change) -> Message:
    """Return a message with other functions in its tool calls.

    Args:
        change: Returns a function's other form. A function has a name and arguments.
    """
    calls = [
        call | {"function": change(call["function"])} if "function" in call else change(call)
        for call in message.get("tool_calls") or ()
    ]
    return message | {"tool_calls": calls} if calls else message


def _same(message: Message) -> Message:
    return message


def _arguments_as_json(message: Message) -> Message:
    def as_json(function: dict[str, Any]) -> dict[str, Any]:
        return function | {"arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}

    return change_calls(message, as_json)


def _null_content(message: Message) -> Message:
    return {"content": None} | message


def _empty_content(message: Message) -> Message:
    return {"content": ""} | message


def _usual_role(message: Message) -> Message:
    usual = {"developer": "system", "function": "tool"}
    return message | {"role": usual.get(message["role"], message["role"])}


def are_parts(content: Any) -> TypeGuard[list[dict[str, str]]]:
    """Return whether a content is a list of parts of type `text`."""
    return isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content)


def result_of(message: Message) -> Any:
    """Return the result of a tool call, if it is an object or a list of JSON instead of a text; otherwise None."""
    content = message.get("content")
    is_value = isinstance(content, (dict, list)) and not are_parts(content)
    return content if is_value or (content == [] and message["role"] in TOOL_ROLES) else None


def _result_as_json(message: Message) -> Message:
    result = result_of(message)
    return message if result is None else message | {"content": json.dumps(result, ensure_ascii=False)}


def _text_content(message: Message) -> Message:
    """Join the parts of a content."""
    content = message.get("content") or ""
    return message | {"content": "".join(part["text"] for part in content)} if are_parts(content) else message


def _parts_content(message: Message) -> Message:
    """Make a part of a content that is a text."""
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


_FORMS: list[tuple[_Change, ...]] = sorted(
    itertools.product(
        (_same, _arguments_as_json),
        (_same, _null_content, _empty_content),
        (_same, _usual_role),
        (_same, _result_as_json),
        (_same, _text_content, _parts_content),
    ),
    key=lambda form: sum(change is not _same for change in form),
)
"""The changes of each form."""
