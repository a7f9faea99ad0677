import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.config import Source
from selfgen_ds.data import hub
from selfgen_ds.data.row_checks import Columns, TextPair
from selfgen_ds.data.rows import _open_hub, _read_hub, open_source
from selfgen_ds.data.tasks import generate
from selfgen_ds.errors import InputError
from tests.rows import usable
from tests.tiers import sweep

GOOD = b'{"prompt": "1+1=", "completion": "2"}'


def _read(tmp_path: Path, content: bytes, prompt: str = "prompt", completion: str = "completion") -> list[Any]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return usable(open_source(Source(path=str(path)), "train", Columns(prompt=prompt, completion=completion)).rows)


def _error(tmp_path: Path, bad_line: bytes) -> str:
    """Return the message that refuses a file whose third line is bad."""
    with pytest.raises(InputError) as caught:
        _read(tmp_path, GOOD + b"\n\n" + bad_line + b"\n" + GOOD + b"\n")
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD_LINES = {
    "no completion": (b'{"prompt": "a"}', "field 'completion' is missing"),
    "empty object": (b"{}", "field 'prompt' is missing"),
    "a truth value": (b'{"prompt": "a", "completion": true}', "field 'completion': expected a text, got bool"),
    "no number": (b'{"prompt": "a", "completion": NaN}', "field 'completion': expected a text or a finite number, got"),
    "null": (b'{"prompt": null, "completion": "b"}', "field 'prompt': expected a text, got NoneType"),
    "empty completion": (
        b'{"prompt": "a", "completion": ""}',
        "field 'completion': expected text, got an empty string",
    ),
    "half a surrogate pair": (rb'{"prompt": "\ud800", "completion": "b"}', "field 'prompt'"),
    "a field named by half a surrogate pair": (rb'{"\ud800": "a"}', "field 'prompt' is missing; the row has '\\ud800'"),
    "cut off": (b'{"prompt": "a", "completion": "b"', "malformed JSON"),
    "two objects": (b'{"prompt": "a", "completion": "b"} {}', "malformed JSON"),
    "list": (b'["a", "b"]', "expected one JSON object, got list"),
    "Latin-1": (b'{"prompt": "\xff", "completion": "b"}', "expected UTF-8"),
    "surrogate in UTF-8": (b'{"prompt": "\xed\xa0\x80", "completion": "b"}', "UTF-8"),
}


@pytest.mark.parametrize(("line", "expected"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_an_error_that_names_file_line_and_field(tmp_path: Path, line: bytes, expected: str) -> None:
    message = _error(tmp_path, line)
    assert f"{tmp_path / 'rows.jsonl'}, line 3" in message
    assert expected in message


def test_the_error_for_a_missing_field_names_the_fields_of_the_row(tmp_path: Path) -> None:
    assert "'question', 'answer'" in _error(tmp_path, b'{"question": "a", "answer": "b"}')


def test_rows_before_a_bad_line_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n{\n")
    rows = open_source(Source(path=str(path)), "train", Columns()).rows
    assert next(iter(rows)) == TextPair(prompt="1+1=", completion="2")


def test_rows_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines = [f'{{"prompt": "p{i}", "completion": "c{i}"}}\n'.encode() for i in range(50)]
    assert _read(tmp_path, b"".join(lines)) == [TextPair(prompt=f"p{i}", completion=f"c{i}") for i in range(50)]


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    assert len(_read(tmp_path, b"\n" + GOOD + b"\n  \n\r\n" + GOOD + b"\n\n")) == 2


def test_the_last_line_needs_no_newline(tmp_path: Path) -> None:
    assert len(_read(tmp_path, GOOD + b"\n" + GOOD)) == 2


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    assert _read(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD) == [TextPair(prompt="1+1=", completion="2")] * 2


def test_columns_are_found_by_the_names_given(tmp_path: Path) -> None:
    content = b'{"prompt": "no", "completion": "no", "question": "q", "answer": "a"}'
    assert _read(tmp_path, content, "question", "answer") == [TextPair(prompt="q", completion="a")]


def test_other_fields_may_hold_anything(tmp_path: Path) -> None:
    content = b'{"prompt": "p", "completion": "c", "id": 3, "tags": [null]}'
    assert _read(tmp_path, content) == [TextPair(prompt="p", completion="c")]


# --- conversations ---

SYSTEM, USER, ASSISTANT, TOOL = (
    f'{{"role": "{role}", "content": "x"}}' for role in ("system", "user", "assistant", "tool")
)
CALL = '{"role": "assistant", "tool_calls": [{"name": "f"}]}'

WEIGHTED = '{"role": "assistant", "content": "x", "weight": %s}'

GOOD_CONVERSATIONS = {
    "one turn": [USER, ASSISTANT],
    "system first": [SYSTEM, USER, ASSISTANT],
    "developer first": [SYSTEM.replace("system", "developer"), USER, ASSISTANT],
    "a tool": [USER, CALL, TOOL, ASSISTANT],
    "two tools": [USER, CALL, TOOL, TOOL, CALL, TOOL, ASSISTANT, USER, ASSISTANT],
    "a call last": [USER, CALL],
    "reasoning alone": [USER, '{"role": "assistant", "content": "", "reasoning_content": "x"}'],
    "two users": [USER, USER, ASSISTANT],
    "assistant first": [ASSISTANT],
    "user last": [USER, ASSISTANT, USER],
    "a function": [USER, CALL, TOOL.replace("tool", "function"), ASSISTANT],
    "content of parts": ['{"role": "user", "content": [{"type": "text", "text": "x"}]}', ASSISTANT],
    "an empty answer of no weight": [USER, WEIGHTED.replace('"x"', '""') % "0", USER, ASSISTANT],
    "a role of Llama 3.1's": [USER, CALL, TOOL.replace("tool", "ipython"), ASSISTANT],
    "a tool that returned nothing": [USER, CALL, '{"role": "tool", "content": null}', ASSISTANT],
    "a tool that returned no rows": [USER, CALL, '{"role": "tool", "content": []}', ASSISTANT],
    "an empty question": ['{"role": "user", "content": ""}', ASSISTANT],
}


@pytest.mark.parametrize("messages", GOOD_CONVERSATIONS.values(), ids=GOOD_CONVERSATIONS)
def test_messages_of_known_roles_are_a_conversation(tmp_path: Path, messages: list[str]) -> None:
    (row,) = _read(tmp_path, f'{{"messages": [{", ".join(messages)}]}}'.encode())
    assert isinstance(row, Conversation)
    assert len(row.messages) == len(messages)


BAD_CONVERSATIONS = {
    "no assistant": ([USER], ": expected a turn of the assistant that is learned, got none"),
    "no weight": ([USER, WEIGHTED % "0"], ": expected a turn of the assistant that is learned, got none"),
    "half a weight": ([USER, WEIGHTED % "0.5"], "message 2, weight: expected 0 or 1, got 0.5"),
    "a true weight": ([USER, WEIGHTED % "true"], "message 2, weight: expected 0 or 1, got True"),
    "a call without a name": ([USER, CALL.replace("name", "names")], "message 2, tool_calls: expected calls with the"),
    "tool calls that are a number": (
        [USER, '{"role": "assistant", "tool_calls": 5, "function_call": {"name": "f"}}'],
        "message 2, tool_calls: expected a list of objects, got int",
    ),
    "tool calls that are a list of numbers": (
        [USER, '{"role": "assistant", "tool_calls": [5]}'],
        "message 2, tool_calls: expected a list of objects, got a list of int",
    ),
    "reasoning that is a list": (
        [USER, '{"role": "assistant", "content": "x", "reasoning_content": ["y"]}'],
        "message 2, reasoning_content: expected a text, got a list of str; write such a value as JSON in a text",
    ),
    "arguments that are no JSON": (
        [USER, '{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}'],
        "message 2, tool_calls, arguments of 'f': expected JSON, got malformed JSON",
    ),
    "arguments that are a list": (
        [USER, '{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}'],
        "message 2, tool_calls, arguments of 'f': expected an object, got a list of int",
    ),
    "a number that JSON has not": (
        [USER, '{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": NaN}}]}'],
        "message 2, tool_calls: expected values as in JSON: NaN or an infinite number is none",
    ),
    "none": ([], ": expected a list of messages, got none"),
    "unknown role": ([USER.replace("user", "human")], "message 1: expected a role of system, developer, user"),
    "role of another kind": (['{"role": ["user"], "content": "x"}'], "message 1: expected a role of"),
    "no role": (['{"content": "x"}'], "message 1: expected a role of"),
    "no object": (['"hello"'], "message 1: expected an object with role and content, got str"),
    "no content": (['{"role": "user"}', ASSISTANT], "message 1: expected a content, got only 'role'"),
    "null content": (
        [USER, '{"role": "assistant", "content": null}'],
        "message 2, content: expected a text, got null; a turn of `weight: 0` may be an empty text",
    ),
    "a null question": (
        ['{"role": "user", "content": null}', ASSISTANT],
        "message 1, content: expected a text, got null",
    ),
    "a blank answer": (
        [USER, '{"role": "assistant", "content": " \\n"}'],
        "message 2, content: expected text, got white",
    ),
    "an image": (
        ['{"role": "user", "content": [{"type": "image"}]}', ASSISTANT],
        "message 1, content: expected a text or parts of type 'text', got 'image'",
    ),
    "an empty answer": ([USER, '{"role": "assistant", "content": ""}'], "message 2, content: expected text, got an em"),
    "half a surrogate pair": ([USER.replace("x", "\\ud800"), ASSISTANT], "message 1, content: expected UTF-8 text"),
}


@pytest.mark.parametrize(("messages", "expected"), BAD_CONVERSATIONS.values(), ids=BAD_CONVERSATIONS)
def test_a_bad_conversation_is_an_error_that_names_file_line_field_and_message(
    tmp_path: Path, messages: list[str], expected: str
) -> None:
    good = f'{{"messages": [{USER}, {ASSISTANT}]}}\n'
    with pytest.raises(InputError) as caught:
        _read(tmp_path, f'{good}\n{{"messages": [{", ".join(messages)}]}}\n{good}'.encode())
    separator = "" if expected.startswith(":") else ", "
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl, line 3, field 'messages'{separator}{expected}")


@pytest.mark.parametrize("value", ['"text"', "null"])
def test_messages_that_are_not_a_list_are_an_error(tmp_path: Path, value: str) -> None:
    with pytest.raises(InputError, match=r"line 1, field 'messages': expected a list of messages, got "):
        _read(tmp_path, f'{{"messages": {value}}}'.encode())


def test_a_bad_prompt_of_messages_names_both_fields(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1, fields 'prompt' and 'completion': expected a turn of the assistant"):
        _read(tmp_path, f'{{"prompt": [{USER}], "completion": [{USER}]}}'.encode())


def test_settings_of_the_template_come_with_the_row(tmp_path: Path) -> None:
    content = f'{{"messages": [{USER}, {ASSISTANT}], "chat_template_kwargs": {{"think": false, "other": null}}}}'
    (row,) = _read(tmp_path, content.encode())
    assert row.template_kwargs == {"think": False}
    pair = f'{{"prompt": [{USER}], "completion": [{ASSISTANT}], "chat_template_kwargs": {{"think": true}}}}'
    (row,) = _read(tmp_path, pair.encode())
    assert row.template_kwargs == {"think": True}
    (row,) = _read(tmp_path, f'{{"messages": [{USER}, {ASSISTANT}], "chat_template_kwargs": null}}'.encode())
    assert row.template_kwargs == {}


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt"])
def test_settings_of_the_template_that_have_another_place_are_refused(tmp_path: Path, name: str) -> None:
    content = f'{{"messages": [{USER}, {ASSISTANT}], "chat_template_kwargs": {{"{name}": true}}}}'
    with pytest.raises(InputError, match=f"field 'chat_template_kwargs': '{name}' cannot be given as a variable"):
        _read(tmp_path, content.encode())


@pytest.mark.parametrize(("tools", "got"), [('"{}"', "dict"), ("[5]", "a list of int"), ("7", "int")])
def test_tools_that_are_no_list_of_objects_are_refused(tmp_path: Path, tools: str, got: str) -> None:
    content = f'{{"messages": [{USER}, {ASSISTANT}], "tools": {tools}}}'
    with pytest.raises(InputError, match=f"field 'tools': expected a list of objects, got {got}"):
        _read(tmp_path, content.encode())


def test_settings_of_the_template_that_are_not_an_object_are_an_error(tmp_path: Path) -> None:
    content = f'{{"messages": [{USER}, {ASSISTANT}], "chat_template_kwargs": [1]}}'
    expected = r"line 1, field 'chat_template_kwargs': expected an object, got list$"
    with pytest.raises(InputError, match=expected):
        _read(tmp_path, content.encode())


# --- where rows come from ---


def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "b.JsonL").write_bytes(GOOD)
    rows = list(open_source(Source(path=str(tmp_path / "b.JsonL")), "train", Columns()).rows)
    assert rows == [TextPair(prompt="1+1=", completion="2")]


def test_a_file_of_a_folder_that_datasets_ignores_for_its_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.JSONL").write_bytes(GOOD)
    with pytest.raises(InputError, match="expected a folder with files that end in"):
        open_source(Source(path=str(tmp_path)), "train", Columns())
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(InputError, match=r"b\.JSONL would be left out beside a\.jsonl: name the files"):
        open_source(Source(path=str(tmp_path)), "train", Columns())


def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a data set as the hub stores it. `datasets` accepts the folder in place of a hub id."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for subset in ("a", "b"):
        for split in ("train", "test"):
            rows = [{"prompt": f"{subset} {split} {i}", "completion": "c", "id": i} for i in range(5)]
            (tmp_path / "hub" / subset).mkdir(parents=True, exist_ok=True)
            (tmp_path / "hub" / subset / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in "ab")
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return str(tmp_path / "hub")


@sweep(("given", "split"), [(None, "train"), ("test", "test")])
def test_a_hub_data_set_is_the_rows_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, split: str
) -> None:
    source = Source(path=_hub(tmp_path, monkeypatch), subset="b", split=given)
    use = "train" if given else split
    opened = _open_hub(source, use, Columns())
    assert list(opened.rows) == [TextPair(prompt=f"b {split} {i}", completion="c") for i in range(5)]
    assert opened.fingerprint == _open_hub(source, use, Columns()).fingerprint
    if given is None:  # one split is enough
        other = _open_hub(Source(path=source.path, subset="a"), use, Columns())
        assert opened.fingerprint[-1] != other.fingerprint[-1]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"subset": "a", "split": "dev"}, "expected a split of train, test, got 'dev'"),
        ({}, "expected a file, a folder or a data set on the hub: "),
    ],
)
def test_a_split_or_subset_that_a_hub_data_set_lacks_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        _open_hub(Source(path=_hub(tmp_path, monkeypatch), **fields), "train", Columns())
    assert "\n" not in str(caught.value)


def test_a_row_of_the_hub_that_cannot_be_read_is_one_line_with_its_number() -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield from ({"prompt": "a", "completion": "b"} for _ in range(2))
        raise ConnectionError("the line\nis cut")

    streamed = datasets.IterableDataset.from_generator(rows)
    found = _read_hub("org/name", streamed)
    assert [next(found)[0], next(found)[0]] == ["row 1", "row 2"]
    with pytest.raises(InputError, match=r"^org/name: cannot be read after row 2: .+$") as caught:
        next(found)
    assert "\n" not in str(caught.value)


def test_a_built_in_task_is_read_by_its_name() -> None:
    rows = list(open_source(Source(path="builtin:running_sum"), "test", Columns()).rows)
    pairs = generate("running_sum", "test")
    assert rows == [TextPair(prompt=prompt, completion=completion) for prompt, completion in pairs]


def test_the_cache_of_a_built_in_task_alone_depends_on_the_code_of_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprints() -> list[list[str]]:
        paths = "builtin:running_sum", str(tmp_path / "rows.jsonl")
        return [open_source(Source(path=path), "train", Columns()).fingerprint for path in paths]

    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    task, file = fingerprints()
    monkeypatch.setattr(inspect, "getsource", lambda _: "other code")
    assert fingerprints()[0] != task
    assert fingerprints()[1] == file


def test_an_id_without_a_hub_is_an_error() -> None:
    expected = r"^nobody/nothing: expected a file, a folder or a data set on the hub: .+$"
    with pytest.raises(InputError, match=expected):
        open_source(Source(path="nobody/nothing"), "train", Columns())


WITHOUT_NETWORK = """
import time
from selfgen_ds.config import Source
from selfgen_ds.errors import InputError
from selfgen_ds.data.row_checks import Columns
from selfgen_ds.data.rows import open_source

started = time.monotonic()
for streaming in (False, True):
    try:
        open_source(Source(path="nobody/nothing", streaming=streaming), "train", Columns())
    except InputError as error:
        print(error)
print(time.monotonic() - started)
"""


@pytest.mark.slow
def test_without_a_network_a_hub_id_is_refused_in_one_line_and_quickly(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE")
    command = [sys.executable, "-c", WITHOUT_NETWORK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    *refusals, seconds = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in refusals] == ["nobody/nothing"] * 2
    assert float(seconds) < 15


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.use_cache_without_network.cache_clear()
    hub.use_cache_without_network()
    assert constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE
    hub.use_cache_without_network.cache_clear()


def test_text_in_one_column_and_messages_in_the_other_is_an_error_that_names_both(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match="line 1, fields 'prompt' and 'completion': expected two texts or two lists"):
        usable(open_source(Source(path=str(path)), "train", Columns()).rows)


def test_files_that_a_readme_does_not_name_are_left_out_on_purpose(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}-0.jsonl").write_text(json.dumps({"prompt": name, "completion": "b"}) + "\n")
    card = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: train-*}\n"
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    rows = open_source(Source(path=str(tmp_path)), "train", Columns()).rows
    assert [row.prompt for row in rows if isinstance(row, TextPair)] == ["train"]


def test_a_value_of_sharegpt_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1, field 'conversations', message 1, `value`: expected a text"):
        _read(tmp_path, b'{"conversations": [{"from": "human", "value": null}]}')
