"""Validation of conversations, which come as OpenAI, TRL and ShareGPT write them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from selfgen_ds.chat.conversation import (
    REASONING_FIELDS,
    TOOL_ROLES,
    Conversation,
    Message,
    change_calls,
    result_of,
)
from selfgen_ds.chat.template import SURROGATE
from selfgen_ds.errors import InputError

_ROLES = ("system", "developer", "user", "assistant", *TOOL_ROLES)
KNOWN_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", *REASONING_FIELDS}
"""Fields of a message that chat templates read. Others are given to the template too."""
_RESERVED = {"messages", "tools", "conversation", "chat_template", "add_generation_prompt", "documents"}
"""Variables of a template that have settings of their own."""
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
    """Return a text, or the digits of a number: 2 and 2.0 are the same number, as in JSON, and become `2`.

    Raises:
        InputError: It is neither, or it is empty, or not UTF-8.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if not math.isfinite(text):
            raise InputError(f"{where}: expected a text or a finite number, got {text}")
        return str(_canonical(text))
    if isinstance(text, (dict, list)):
        raise InputError(f"{where}: expected a text, got {_kinds(text)}; write such a value as JSON in a text")
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a text, got {type(text).__name__}")
    if not text and not may_be_empty:
        raise InputError(f"{where}: expected text, got an empty string")
    if not text.isascii() and SURROGATE.search(text):
        raise InputError(f"{where}: expected UTF-8 text, got half a surrogate pair or a stray byte; save it as UTF-8")
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
        raise InputError(f"{where}: expected a list of objects with `from` and `value`, got {_kinds(value)}")
    messages = []
    for number, turn in enumerate(value, start=1):
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            expected = ", ".join(_SHAREGPT_ROLES)
            raise InputError(f"{where}, message {number}, `from`: expected one of {expected}, got {speaker!r}")
        if turn.get("value") is None:
            raise InputError(f"{where}, message {number}, `value`: expected a text, got nothing")
        content = turn["value"]
        message: Message = {"role": _SHAREGPT_ROLES[speaker], "content": content}
        if speaker == "function_call":
            message = {"role": "assistant", "tool_calls": _sharegpt_calls(content, f"{where}, message {number}")}
        messages.append({name: part for name, part in turn.items() if name not in ("from", "value")} | message)
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
    chat = _checked(messages, fields, where, messages_where)
    unlearned = {i for i, message in enumerate(chat.messages) if message.pop("weight", 1) == 0} | set(range(given))
    if not any(m["role"] == "assistant" and i not in unlearned for i, m in enumerate(chat.messages)):
        raise InputError(f"{messages_where}: expected a turn of the assistant that is learned, got none")
    return replace(chat, unlearned=frozenset(unlearned))


def prompt_of(messages: Any, fields: dict[str, Any], where: str, messages_where: str) -> Conversation:
    """Return a conversation that the assistant is to continue.

    Raises:
        InputError: A message or another field is not as expected, or the last message is the assistant's.
    """
    chat = _checked(messages, fields, where, messages_where)
    if chat.messages[-1]["role"] == "assistant":
        raise InputError(f"{messages_where}: expected a message to answer at the end, got the assistant's")
    return chat


def _checked(messages: Any, fields: dict[str, Any], where: str, messages_where: str) -> Conversation:
    if not isinstance(messages, list) or not messages:
        got = "none" if messages == [] else type(messages).__name__
        raise InputError(f"{messages_where}: expected a list of messages, got {got}")
    return Conversation(
        messages=[_message(message, f"{messages_where}, message {i}") for i, message in enumerate(messages, start=1)],
        tools=_tools(fields.get("tools"), f"{where}, field 'tools'")
        or _tools_of_functions(fields.get("functions"), f"{where}, field 'functions'"),
        template_kwargs=_template_kwargs(
            fields.get("chat_template_kwargs") or {}, f"{where}, field 'chat_template_kwargs'"
        ),
        where=where,
    )


def _template_kwargs(settings: Any, where: str) -> dict[str, Any]:
    """Check the variables that a row gives to its template."""
    if not isinstance(settings, dict):
        raise InputError(f"{where}: expected an object, got {type(settings).__name__}")
    settings = _canonical(settings)
    for name in settings.keys() & _RESERVED:
        raise InputError(f"{where}: {name!r} cannot be given as a variable")
    _check_json(settings, where)
    return settings


def _check_json(value: Any, where: str) -> None:
    """Check that a value holds nothing that JSON has not: Parquet and Arrow may hold dates and bytes."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = "NaN or an infinite number is none" if "float" in str(error) else str(error)
        raise InputError(f"{where}: expected values as in JSON: {reason}") from error


def _kinds(value: Any) -> str:
    """Return the name of a value's type or, of a list, those of its elements."""
    if not isinstance(value, list):
        return type(value).__name__
    return "a list of " + (", ".join(sorted({type(part).__name__ for part in value})) or "nothing")


def _message(fields: Any, where: str) -> Message:
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected an object with role and content, got {type(fields).__name__}")
    message = _canonical(fields)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"{where}: expected a role of {', '.join(_ROLES)}, got {role!r}")
    weight = message.get("weight", 1)
    if weight not in (0, 1) or isinstance(weight, bool):
        raise InputError(f"{where}, weight: expected 0 or 1, got {weight!r}")
    for name in REASONING_FIELDS:
        if name in message:
            message[name] = check_text(message[name], f"{where}, {name}", may_be_empty=True)
    message = _with_tool_calls(message, where)
    for name, value in message.items():
        _check_json(value, f"{where}, {name}")
    says_more = bool(message.get("tool_calls")) or any(message.get(name) for name in REASONING_FIELDS)
    if "content" not in message and fields.get("content", "") is None and role in TOOL_ROLES:
        message["content"] = ""  # a tool that returned nothing
    if "content" not in message:
        if not says_more and "content" in fields:
            advice = "; a turn of `weight: 0` may be an empty text" if role == "assistant" else "; write an empty text"
            raise InputError(f"{where}, content: expected a text, got null{advice}")
        if not says_more:
            raise InputError(f"{where}: expected a content, got only {', '.join(map(repr, message))}")
        return message
    if role in TOOL_ROLES and result_of(message) is not None:
        return message
    may_be_empty = says_more or role != "assistant" or weight == 0
    if not may_be_empty and (message["content"] == [] or not str(message["content"]).strip()):
        got = "white space" if message["content"] else "an empty string"
        raise InputError(f"{where}, content: expected text, got {got}; a turn of `weight: 0` may be empty")
    return message | {"content": _content(message["content"], f"{where}, content", may_be_empty)}


def _with_tool_calls(message: Message, where: str) -> Message:
    """Return a message whose tool calls, if it has any, have a name and arguments that are objects."""
    calls = message.pop("tool_calls", None) or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{where}, tool_calls: expected a list of objects, got {_kinds(calls)}")
    if legacy := message.pop("function_call", None):
        calls = [*calls, {"type": "function", "function": legacy}]
    if not calls:
        return message
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}, tool_calls: expected calls with the name of a function, got {call!r}")

    def with_object(function: dict[str, Any]) -> dict[str, Any]:
        place = f"{where}, tool_calls, arguments of {function['name']!r}"
        arguments = _parsed(function.get("arguments") or {}, place)
        if not isinstance(arguments, dict):
            raise InputError(f"{place}: expected an object, got {_kinds(arguments)}")
        return function | {"arguments": arguments}

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
    return parts


def _canonical(value: Any) -> Any:
    """Return a value of JSON as every kind of file gives it.

    Parquet and Arrow give every object of a column the fields of all the others, as nulls, and every number of a
    column that has a fraction somewhere a fraction: null fields are dropped, and 2.0 becomes 2, at any depth.
    """
    if isinstance(value, dict):
        return {name: _canonical(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_canonical(part) for part in value]
    # above 2^53 the digits of an integer would be more than the number says
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _tools_of_functions(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the tools of OpenAI's older field `functions`, which holds their descriptions alone."""
    functions = _tools(value, where)
    return functions and [{"type": "function", "function": function} for function in functions]


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the schemas of the tools that a conversation may call, given as a list or as the list's JSON."""
    value = _parsed(value, where) if value else value
    if value in (None, ""):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputError(f"{where}: expected a list of objects, got {_kinds(value)}")
    _check_json(value, where)
    return _canonical(value) or None
