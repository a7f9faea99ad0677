"""Conversations of every kind under the chat templates that TRL carries, and the table in `docs/conversations.md`.

`python -m tests.chat_templates` writes the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from selfgen_ds.chat.conversation import REASONING_FIELDS, Conversation, Message, forms
from selfgen_ds.chat.encoder import ChatEncoder
from selfgen_ds.errors import InputError
from tests.chat_tokenizers import build

PAGE = Path(__file__).parent.parent / "docs" / "conversations.md"
TABLE = re.compile(r"(<!-- Written by `python -m tests.chat_templates`. -->\n\n).*?(?=\n## )", re.DOTALL)


def _user(content: Any) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: Any = None, **fields: Any) -> Message:
    return {"role": "assistant", **({} if content is None else {"content": content}), **fields}


def _call(city: str) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": {"city": city, "days": 2, "exact": True, "hours": [6, 18]}}
    return {"type": "function", "id": "abcdefghi", "function": function}


def _result(content: Any) -> Message:
    return {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": content}


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


_CITY = {"type": "string", "description": "The city."}
_PARAMETERS = {"type": "object", "properties": {"city": _CITY}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Rain?", "parameters": _PARAMETERS}}]
_SYSTEM: Message = {"role": "system", "content": "GIVEN system"}
_RAIN = '{"degrees": 3,\n "sky": "GIVEN result"}'
_WEATHER = [_user("GIVEN question"), _assistant(tool_calls=[_call("WRITTEN1")]), _result(_RAIN)]
_DONE = _assistant("WRITTEN3 answer")
_THOUGHT = "<think>\nWRITTEN1 thought\n</think>\n\nWRITTEN2 answer"
_THOUGHT_LATER = "<think>\nWRITTEN3 thought\n</think>\n\nWRITTEN4 answer"

KINDS: dict[str, list[Message]] = {
    "one turn": [_user("GIVEN question"), _assistant("WRITTEN1 answer")],
    "turns": [_user("GIVEN one"), _assistant("WRITTEN1 one"), _user("GIVEN two"), _assistant("WRITTEN2 two")],
    "system": [_SYSTEM, _user("GIVEN question"), _assistant("WRITTEN1 answer")],
    "developer": [_SYSTEM | {"role": "developer"}, _user("GIVEN question"), _assistant("WRITTEN1 answer")],
    "parts": [_user(_parts("GIVEN question")), _assistant(_parts("WRITTEN1 answer"))],
    "mixed parts": [_user(_parts("GIVEN question")), _assistant("WRITTEN1 answer")],
    "`<think>`": [_user("GIVEN question"), _assistant(_THOUGHT)],
    "`<think>` in turns": [_user("GIVEN one"), _assistant(_THOUGHT), _user("GIVEN two"), _assistant(_THOUGHT_LATER)],
    "reasoning": [_user("GIVEN question"), _assistant("WRITTEN2 answer", reasoning_content="WRITTEN1 thought")],
    "reasoning in turns": [
        _user("GIVEN one"),
        _assistant("WRITTEN2 answer", reasoning_content="WRITTEN1 thought"),
        _user("GIVEN two"),
        _assistant("WRITTEN4 answer", reasoning_content="WRITTEN3 thought"),
    ],
    "tool": [*_WEATHER, _assistant("WRITTEN2 answer")],
    "object result": [*_WEATHER[:2], _result({"degrees": 3, "sky": "GIVEN result"}), _assistant("WRITTEN2 answer")],
    "empty results": [*_WEATHER[:2], _result(""), _assistant(tool_calls=[_call("WRITTEN2")]), _result(""), _DONE],
    "blank and tool": [_WEATHER[0], _assistant("\n\n", tool_calls=[_call("WRITTEN1")]), _WEATHER[2], _DONE],
    "tool, last": _WEATHER[:2],
    "tool and content": [
        _WEATHER[0],
        _assistant("WRITTEN2 look", tool_calls=[_call("WRITTEN1")]),
        _WEATHER[2],
        _assistant("WRITTEN3 answer"),
    ],
    "two tools": [
        _WEATHER[0],
        _assistant(tool_calls=[_call("WRITTEN1"), _call("WRITTEN2")]),
        *[_WEATHER[2]] * 2,
        _assistant("WRITTEN3 answer"),
    ],
    "tool and reasoning": [
        _WEATHER[0],
        _assistant(tool_calls=[_call("WRITTEN2")], reasoning_content="WRITTEN1 thought"),
        _WEATHER[2],
        _assistant("WRITTEN3 answer"),
    ],
}
"""Kind of conversation -> messages. Texts that the assistant writes have a word `WRITTEN` with a number of its own."""

_CLOSING = (
    *("<|im_end|>", "<|return|>", "<turn|>", "<end_of_turn>", "<|eot_id|>", "<\uff5cend▁of▁sentence\uff5c>"),
    *("<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "</s>", "<|end|>", "<|endoftext|>"),
)
_SPECIAL = re.compile(
    "<[|\uff5c][^<>|\uff5c\\s{}']*[|\uff5c]>"
    r"|<start_of_turn>|<\|?(?:turn|channel|tool_call|tool_response|tool)\|?>"
)


def templates() -> dict[str, str]:
    """Return TRL's chat templates by name, without an import of TRL."""
    found = find_spec("trl")
    assert found is not None
    assert found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / "chat_templates"
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))}


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """Return a small tokenizer with a chat template and with the special tokens that the template writes."""
    closing = [token for token in _CLOSING if token in template] or ["<|endoftext|>"]
    special = sorted({*_SPECIAL.findall(template), *closing} - {closing[0]})
    return build(template, "byte_level", tuple(special), "<bos>", closing[0])


def conversation(kind: str) -> Conversation:
    """Return a conversation of a kind, with tools if it calls one."""
    messages = KINDS[kind]
    tools = TOOLS if any("tool_calls" in message for message in messages) else None
    return Conversation(messages=messages, tools=tools, where=kind)


def refusal(tokenizer: PreTrainedTokenizerFast, chat: Conversation) -> str:
    """Return why a conversation cannot be learned; nothing if it can."""
    try:
        ChatEncoder(tokenizer, "all").encode([chat])
    except InputError as error:
        return str(error)
    return ""


def is_shown(tokenizer: PreTrainedTokenizerFast, chat: Conversation) -> bool:
    """Return whether plain transformers shows every part of a conversation, in one of the forms of the same messages.

    What the assistant writes has to be shown at least as long as no message follows.
    """
    return any(_is_shown(tokenizer, form.messages, form.tools) for _, form in forms(0, chat))


def _is_shown(tokenizer: PreTrainedTokenizerFast, messages: list[Message], tools: list[Any] | None) -> bool:
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        if tools and text == tokenizer.apply_chat_template(messages, tokenize=False):
            return False
        for i, message in enumerate(messages):
            words = [word for field in _texts(message) for word in re.findall(r"(?:GIVEN \w+|WRITTEN\d)", field)]
            if message["role"] == "assistant":
                text += tokenizer.apply_chat_template(messages[: i + 1], tools=tools, tokenize=False)
            if any(word not in text for word in words):
                return False
    except Exception:  # a template can raise anything
        return False
    return True


def _texts(message: Message) -> Iterator[str]:
    content = message.get("content") or ""
    yield content[0]["text"] if isinstance(content, list) else str(content)
    yield from (message[name] for name in REASONING_FIELDS if name in message)
    yield from (str(call["function"]["arguments"]) for call in message.get("tool_calls", ()))


def table() -> str:
    """Return the table in Markdown: a row for all templates of the same results."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, template in templates().items():
        tokenizer = tokenizer_of(template)
        cells = []
        for kind in KINDS:
            chat = conversation(kind)
            cells.append("yes" if not refusal(tokenizer, chat) else "no" if is_shown(tokenizer, chat) else "")
        names.setdefault(tuple(cells), []).append(name)
    lines = [f"| templates | {' | '.join(KINDS)} |", "|" + "---|" * (len(KINDS) + 1)]
    for results, of_row in sorted(names.items(), key=lambda item: (-len(item[1]), item[1])):
        lines.append(f"| {', '.join(of_row)} | {' | '.join(results)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda match: match[1] + table(), page), encoding="utf-8")
