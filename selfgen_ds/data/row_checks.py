"""Validation of rows: a row is a pair of texts (prompt, completion) or a conversation in TRL's `messages` form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from selfgen_ds.data.chat import SURROGATE, Conversation
from selfgen_ds.data.formats import RawRow
from selfgen_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """One example as two texts."""

    prompt: str
    completion: str
    where: str = field(default="", compare=False)
    """File and line of the example; empty for a built-in task."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the fields that are read from a row."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"


def validated(name: str, raw_rows: Iterable[RawRow], columns: Columns) -> Iterator[TextPair | Conversation]:
    """Yield the rows of one file. The first row tells whether all of them are pairs of texts or conversations.

    Raises:
        InputError: A row is not as expected. The message names the file, the row, and the field.
    """
    pairs: bool | None = None
    for location, fields in raw_rows:
        where = f"{name}, {location}"
        if pairs is None:
            pairs = columns.messages not in fields or (columns.prompt in fields and columns.completion in fields)
        if pairs:
            yield _pair(fields, where, columns)
        else:
            value = _field(fields, columns, "messages", where)
            messages = _check_messages(value, f"{where}, field {columns.messages!r}")
            yield _conversation(messages, fields, where)


def _pair(fields: dict[str, Any], where: str, columns: Columns) -> TextPair | Conversation:
    prompt, completion = _field(fields, columns, "prompt", where), _field(fields, columns, "completion", where)
    both = f"{where}, fields {columns.prompt!r} and {columns.completion!r}"
    if _are_messages(prompt) and _are_messages(completion):
        return _conversation(_check_messages(prompt + completion, both), fields, where, given=len(prompt))
    if _are_messages(prompt) != _are_messages(completion):
        raise InputError(f"{both}: expected two texts or two lists of messages, got one of each")
    for column, text in ((columns.prompt, prompt), (columns.completion, completion)):
        _check_text(text, f"{where}, field {column!r}")
    return TextPair(prompt=prompt, completion=completion, where=where)


def _field(fields: dict[str, Any], columns: Columns, kind: str, where: str) -> Any:
    """Return a field of a row. `kind` is `prompt`, `completion` or `messages`."""
    column = getattr(columns, kind)
    if column not in fields:
        has = ", ".join(map(repr, fields)) or "no field"
        raise InputError(
            f"{where}: field {column!r} is missing; the row has {has}; if one of them is the {kind}, name it with "
            f"{kind}_column"
        )
    return fields[column]


def _check_text(text: Any, where: str, may_be_empty: bool = False) -> None:
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a string, got {type(text).__name__}")
    if not text and not may_be_empty:
        raise InputError(f"{where}: expected text, got an empty string")
    if not text.isascii() and SURROGATE.search(text):
        raise InputError(f"{where}: expected UTF-8 text, got half a surrogate pair or a stray byte")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(m, dict) and "role" in m for m in value)


# Role -> the roles that it may follow; None stands for the start of the conversation.
_MAY_FOLLOW: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "developer": (None,),
    "user": (None, "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the messages of a conversation without null fields, after checking that the roles take turns.

    The assistant's message must be the last.
    """
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: expected a list of messages, got {'none' if value == [] else type(value).__name__}")
    messages = []
    previous: str | None = None
    for number, fields in enumerate(value, start=1):
        message_where = f"{where}, message {number}"
        if not isinstance(fields, dict):
            raise InputError(f"{message_where}: expected an object with role and content, got {type(fields).__name__}")
        message = _without_nulls(fields)
        role = message.get("role")
        if not isinstance(role, str) or role not in _MAY_FOLLOW:
            raise InputError(f"{message_where}: expected a role of {', '.join(_MAY_FOLLOW)}, got {role!r}")
        if previous not in _MAY_FOLLOW[role]:
            order = f"after {previous!r}" if previous else "comes first"
            raise InputError(f"{message_where}: roles out of order: {role!r} {order}")
        calls = role == "assistant" and message.get("tool_calls")
        if not calls and "content" not in message:
            raise InputError(f"{message_where}: has no content, but {', '.join(map(repr, message))}")
        if not calls or "content" in message:
            may_be_empty = bool(calls) or role != "assistant"
            _check_text(message.get("content"), f"{message_where}, content", may_be_empty)
        messages.append(message)
        previous = role
    if previous != "assistant":
        raise InputError(f"{where}: expected the assistant's message last, got one of role {previous!r}")
    return messages


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """Drop null fields, because Arrow gives every object of a column the fields of all the others."""
    return {name: value for name, value in fields.items() if value is not None}


def _conversation(messages: list[dict[str, Any]], fields: dict[str, Any], where: str, given: int = 0) -> Conversation:
    """Join messages with the settings and tools that a row may hold for its chat template, as in TRL."""
    settings = fields.get("chat_template_kwargs") or {}
    if not isinstance(settings, dict):
        raise InputError(f"{where}, field 'chat_template_kwargs': expected an object, got {type(settings).__name__}")
    tools = _tools(fields.get("tools"), f"{where}, field 'tools'")
    settings = _without_nulls(settings)
    return Conversation(messages=messages, given=given, tools=tools, template_kwargs=settings, where=where)


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the schemas of the tools that a conversation may call, given as a list or as the list's JSON."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: expected JSON, got malformed JSON: {error}") from error
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise InputError(f"{where}: expected a list of objects, got {type(value).__name__}")
    return value or None
