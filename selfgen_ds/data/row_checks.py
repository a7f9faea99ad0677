"""Validation of rows: a row is a pair of texts or a conversation, in the form of TRL, OpenAI, ShareGPT or Alpaca."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from selfgen_ds.chat.conversation import Conversation, Message
from selfgen_ds.data.formats import RawRow
from selfgen_ds.data.message_checks import are_messages, check_text, conversation, messages_of_sharegpt
from selfgen_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """One example as two texts."""

    prompt: str
    completion: str
    where: str = field(default="", compare=False)
    """File and line of the example; empty for a built-in task."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A row that cannot be used."""

    reason: str
    """Names the file, the row, and the field."""


Row = TextPair | Conversation | Refused


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the fields that are read from a row."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"


_Fields = dict[str, Any]
_Form = Callable[[_Fields, Columns, str], TextPair | Conversation]


def validated(name: str, raw_rows: Iterable[RawRow], columns: Columns) -> Iterator[Row]:
    """Yield the rows of one file. The first row that can be read tells the form of all of them."""
    form: _Form | None = None
    for location, fields in raw_rows:
        where = f"{name}, {location}"
        row: Row
        try:
            if isinstance(fields, InputError):
                raise fields
            read = form or _form_of(fields, columns)
            row = read(fields, columns, where)
            form = read
        except InputError as error:
            row = Refused(reason=str(error))
        yield row


def _form_of(fields: _Fields, columns: Columns) -> _Form:
    if columns.prompt in fields and columns.completion in fields:
        return _pair
    if columns.messages in fields:
        return _messages
    if "conversations" in fields:
        return _sharegpt
    if "instruction" in fields and "output" in fields:
        return _alpaca
    return _pair


def _pair(fields: _Fields, columns: Columns, where: str) -> TextPair | Conversation:
    prompt, completion = _field(fields, columns, "prompt", where), _field(fields, columns, "completion", where)
    both = f"{where}, fields {columns.prompt!r} and {columns.completion!r}"
    if are_messages(prompt) and are_messages(completion):
        return conversation([*prompt, *completion], fields, where, both, given=len(prompt))
    if are_messages(prompt) != are_messages(completion):
        raise InputError(f"{both}: expected two texts or two lists of messages, got one of each")
    return TextPair(
        prompt=check_text(prompt, f"{where}, field {columns.prompt!r}"),
        completion=check_text(completion, f"{where}, field {columns.completion!r}"),
        where=where,
    )


def _messages(fields: _Fields, columns: Columns, where: str) -> Conversation:
    messages = _field(fields, columns, "messages", where)
    return conversation(messages, fields, where, f"{where}, field {columns.messages!r}")


def _sharegpt(fields: _Fields, columns: Columns, where: str) -> Conversation:
    """Read a row of ShareGPT: `conversations: [{from: human, value: ...}, {from: gpt, value: ...}]`."""
    field_where = f"{where}, field 'conversations'"
    if "conversations" not in fields:
        raise InputError(f"{field_where}: missing")
    return conversation(sharegpt_messages(fields, field_where), fields, where, field_where)


def sharegpt_messages(fields: _Fields, where: str) -> list[Message]:
    """Return the messages of a row of ShareGPT, its `system` included."""
    messages = messages_of_sharegpt(fields["conversations"], where)
    system = fields.get("system")
    return messages if system in (None, "") else [{"role": "system", "content": system}, *messages]


def _alpaca(fields: _Fields, columns: Columns, where: str) -> TextPair:
    """Read a row of Alpaca: the prompt is `instruction` and, after an empty line, `input`; `output` is learned."""
    for name in ("system", "history"):
        if fields.get(name):
            raise InputError(f"{where}, field {name!r}: write such rows as conversations (`messages`)")
    for name in ("instruction", "output"):
        if name not in fields:
            raise InputError(f"{where}: field {name!r} is missing")
    completion = check_text(fields["output"], f"{where}, field 'output'")
    return TextPair(prompt=alpaca_prompt(fields, where), completion=completion, where=where)


def alpaca_prompt(fields: _Fields, where: str) -> str:
    """Return the prompt of a row of Alpaca: its `instruction` and, after an empty line, its `input`."""
    prompt = check_text(fields["instruction"], f"{where}, field 'instruction'")
    if fields.get("input") not in (None, ""):
        prompt += "\n\n" + check_text(fields["input"], f"{where}, field 'input'")
    return prompt


def _field(fields: _Fields, columns: Columns, kind: str, where: str) -> Any:
    """Return a field of a row. `kind` is `prompt`, `completion` or `messages`."""
    column = getattr(columns, kind)
    if column not in fields:
        has = ", ".join(map(repr, fields)) or "no field"
        hint = f"if one of them is the {kind}, name it with {kind}_column"
        hint += "" if kind == "messages" else ", or a conversation with messages_column"
        if len(fields) == 1 and ";" in has:
            hint = "the file seems to be separated by semicolons; write it with commas, or as .tsv with tabs"
        raise InputError(f"{where}: field {column!r} is missing; the row has {has}; {hint}")
    return fields[column]
