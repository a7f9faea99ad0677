"""Validation of conversations, which come as OpenAI, TRL and ShareGPT write them."""

from __future__ import annotations

import json
from typing import Any

from selfgen_ds.data.chat_template import SURROGATE
from selfgen_ds.data.conversation import REASONING_FIELDS, Conversation, Message, change_calls
from selfgen_ds.errors import InputError

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
KNOWN_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", *REASONING_FIELDS}
"""Fields of a message that chat templates read. Others are given to the template too."""
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def check_text(text: Any, where: str, may_be_empty: bool = False) -> str:
    """Return a text, or the digits of a number.

    Raises:
        InputError: It is neither, or it is empty, or not UTF-8.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return str(text)
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a string, got {type(text).__name__}")
    if not text and not may_be_empty:
        raise InputError(f"{where}: expected text, got an empty string")
    if not text.isascii() and SURROGATE.search(text):
        raise InputError(f"{where}: expected UTF-8 text, got half a surrogate pair or a stray byte")
    return text


def are_messages(value: Any) -> bool:
    """Return whether a value looks like a list of messages."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(m, dict) and "role" in m for m in value)


def messages_of_sharegpt(value: Any, where: str) -> list[Message]:
    """Return the messages of a list of `{from, value}`, or of messages in OpenAI's form.

    Raises:
        InputError: The list has another form, or an unknown speaker.
    """
    if are_messages(value):
        return value
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise InputError(f"{where}: expected a list of objects with `from` and `value`, got {type(value).__name__}")
    messages = []
    for number, turn in enumerate(value, start=1):
        speaker = turn.get("from")
        if speaker not in _SHAREGPT_ROLES:
            expected = ", ".join(_SHAREGPT_ROLES)
            raise InputError(f"{where}, message {number}, `from`: expected one of {expected}, got {speaker!r}")
        content = turn.get("value")
        message: Message = {"role": _SHAREGPT_ROLES[speaker], "content": content}
        if speaker == "function_call":
            message = {"role": "assistant", "tool_calls": _sharegpt_calls(content, f"{where}, message {number}")}
        messages.append(message | {name: turn[name] for name in ("weight",) if name in turn})
    return messages


def _sharegpt_calls(content: Any, where: str) -> list[dict[str, Any]]:
    """Return the tool calls that a text holds as JSON: `{"name": ..., "arguments": ...}`, or a list of these."""
    calls = _parsed(content, where)
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _parsed(text: Any, where: str) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected JSON, got malformed JSON: {error}") from error


def conversation(
    messages: Any, fields: dict[str, Any], where: str, messages_where: str, given: int = 0
) -> Conversation:
    """Return a conversation with the settings and tools that a row may hold for its chat template, as in TRL.

    Args:
        given: Number of messages at the start that are the prompt.

    Raises:
        InputError: A message or another field is not as expected, or the assistant has no turn to learn.
    """
    if not isinstance(messages, list) or not messages:
        got = "none" if messages == [] else type(messages).__name__
        raise InputError(f"{messages_where}: expected a list of messages, got {got}")
    checked = [_message(message, f"{messages_where}, message {i}") for i, message in enumerate(messages, start=1)]
    settings = fields.get("chat_template_kwargs") or {}
    if not isinstance(settings, dict):
        raise InputError(f"{where}, field 'chat_template_kwargs': expected an object, got {type(settings).__name__}")
    unlearned = {i for i, message in enumerate(checked) if message.pop("weight", 1) == 0} | set(range(given))
    if not any(message["role"] == "assistant" and i not in unlearned for i, message in enumerate(checked)):
        raise InputError(f"{messages_where}: expected a turn of the assistant that is learned, got none")
    return Conversation(
        messages=checked,
        unlearned=frozenset(unlearned),
        tools=_tools(fields.get("tools"), f"{where}, field 'tools'"),
        template_kwargs=_without_nulls(settings),
        where=where,
    )


def _message(fields: Any, where: str) -> Message:
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected an object with role and content, got {type(fields).__name__}")
    message = _without_nulls(fields)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"{where}: expected a role of {', '.join(_ROLES)}, got {role!r}")
    weight = message.get("weight", 1)
    if weight not in (0, 1) or isinstance(weight, bool):
        raise InputError(f"{where}, weight: expected 0 or 1, got {weight!r}")
    message = _with_tool_calls(message, where)
    calls = message.get("tool_calls")
    if "content" not in message:
        if not calls:
            raise InputError(f"{where}: has no content, but {', '.join(map(repr, message))}")
        return message
    return message | {"content": _content(message["content"], f"{where}, content", bool(calls) or role != "assistant")}


def _with_tool_calls(message: Message, where: str) -> Message:
    """Return a message whose tool calls, if it has any, have a name and arguments that are objects."""
    calls = message.pop("tool_calls", None) or []
    if legacy := message.pop("function_call", None):
        calls = [*calls, {"type": "function", "function": legacy}]
    if not calls:
        return message
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{where}, tool_calls: expected a list of objects, got {type(calls).__name__}")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}, tool_calls: expected calls with the name of a function, got {call!r}")

    def with_object(function: dict[str, Any]) -> dict[str, Any]:
        arguments = _parsed(function.get("arguments", {}) or {}, f"{where}, tool_calls, arguments")
        return function | {"arguments": _without_nulls(arguments) if isinstance(arguments, dict) else arguments}

    return change_calls(message | {"tool_calls": calls}, with_object)


def _content(content: Any, where: str, may_be_empty: bool) -> str | list[dict[str, str]]:
    """Check a content: a text, a number, or a list of parts of type `text`."""
    if not isinstance(content, list):
        return check_text(content, where, may_be_empty)
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            got = repr(part.get("type")) if isinstance(part, dict) else type(part).__name__
            raise InputError(f"{where}: expected a text or parts of type 'text', got {got}")
        parts.append({"type": "text", "text": check_text(part.get("text"), where, may_be_empty)})
    if not may_be_empty and not parts:
        raise InputError(f"{where}: expected text, got no part")
    return parts


def _without_nulls(value: Any) -> Any:
    """Drop null fields at any depth, because Arrow gives every object of a column the fields of all the others."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the schemas of the tools that a conversation may call, given as a list or as the list's JSON."""
    value = _parsed(value, where) if isinstance(value, str) and value else value
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise InputError(f"{where}: expected a list of objects, got {type(value).__name__}")
    return _without_nulls(value) or None
