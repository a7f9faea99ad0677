import csv
import datetime
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.config import Source
from selfgen_ds.data.formats import READERS, read_file
from selfgen_ds.data.row_checks import Columns, Refused, TextPair
from selfgen_ds.data.rows import open_source
from selfgen_ds.errors import InputError
from tests.rows import usable
from tests.tiers import sweep

Rows = list[dict[str, Any]]

PAIRS: Rows = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": ' a, "quoted"\nsecond line ', "completion": "\tné 日本 😀"},
    {"prompt": "x", "completion": "\r\n"},
] * 5
CHATS: Rows = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"{number} apples"},
            {"role": "assistant", "content": 'a "few"\n'},
        ]
    }
    for number in range(7)
]
PROMPT_AND_COMPLETION: Rows = [{"prompt": row["messages"][:2], "completion": row["messages"][2:]} for row in CHATS]


def _read(
    path: Path, use: str = "train", columns: Columns | None = None, **source: Any
) -> list[TextPair | Conversation]:
    return usable(open_source(Source(path=str(path), **source), use, columns or Columns()).rows)


def _as_rows(rows: Rows) -> list[TextPair]:
    return [TextPair(prompt=row["prompt"], completion=row["completion"]) for row in rows]


def _error(path: Path, **others: Any) -> str:
    """Return the one-line message that refuses a file."""
    with pytest.raises(InputError) as caught:
        _read(path, **others)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _json_array(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def _csv(path: Path, rows: Rows) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _csv_with_mark(path: Path, rows: Rows) -> None:
    _csv(path, rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def _tsv(path: Path, rows: Rows) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def _zipped(write: Callable[[Path, Rows], None]) -> Callable[[Path, Rows], None]:
    def writer(path: Path, rows: Rows) -> None:
        write(path, rows)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return writer


def _parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)


def _arrow(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def _arrow_file(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


WRITERS: dict[str, tuple[str, Callable[[Path, Rows], None]]] = {
    "jsonl": ("rows.jsonl", _jsonl),
    "json array": ("rows.json", _json_array),
    "json lines": ("rows.json", _jsonl),
    "parquet": ("rows.parquet", _parquet),
    "arrow stream": ("rows.arrow", _arrow),
    "arrow file": ("rows.arrow", _arrow_file),
    "csv": ("rows.csv", _csv),
    "csv with a byte order mark": ("rows.csv", _csv_with_mark),
    "tsv": ("rows.tsv", _tsv),
    "jsonl, zipped": ("rows.jsonl.gz", _zipped(_jsonl)),
    "json array, zipped": ("rows.json.gz", _zipped(_json_array)),
    "csv, zipped": ("rows.csv.gz", _zipped(_csv)),
    "tsv, zipped": ("rows.tsv.gz", _zipped(_tsv)),
}
TEXT_ONLY = {"csv", "csv with a byte order mark", "tsv", "csv, zipped", "tsv, zipped"}
EVERY_FORMAT = pytest.mark.parametrize("form", WRITERS)
EVERY_FORMAT_WITH_LISTS = pytest.mark.parametrize("form", [form for form in WRITERS if form not in TEXT_ONLY])


def _write(folder: Path, form: str, rows: Rows) -> Path:
    name, writer = WRITERS[form]
    writer(folder / name, rows)
    return folder / name


# --- the same rows through every format ---


@EVERY_FORMAT
def test_pairs_are_the_same_in_every_format(tmp_path: Path, form: str) -> None:
    assert _read(_write(tmp_path, form, PAIRS)) == _as_rows(PAIRS)


def test_any_two_columns_can_be_named(tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "Frage": row["prompt"], "prompt": "no", "a b": row["completion"]} for i, row in enumerate(PAIRS)
    ]
    path = _write(tmp_path, "jsonl", rows)
    assert _read(path, columns=Columns(prompt="Frage", completion="a b")) == _as_rows(PAIRS)


@EVERY_FORMAT_WITH_LISTS
def test_conversations_are_the_same_in_every_format(tmp_path: Path, form: str) -> None:
    rows = _read(_write(tmp_path, form, CHATS))
    assert [row.messages for row in rows if isinstance(row, Conversation)] == [row["messages"] for row in CHATS]


def test_conversations_may_be_in_any_column(tmp_path: Path) -> None:
    rows = [{"turns": row["messages"]} for row in CHATS]
    assert len(_read(_write(tmp_path, "jsonl", rows), columns=Columns(messages="turns"))) == 7


def test_a_prompt_and_a_completion_of_messages_are_one_conversation_whose_prompt_is_given(tmp_path: Path) -> None:
    rows = [row for row in _read(_write(tmp_path, "jsonl", PROMPT_AND_COMPLETION)) if isinstance(row, Conversation)]
    assert [row.messages for row in rows] == [row["messages"] for row in CHATS]
    assert {row.unlearned for row in rows} == {frozenset({0, 1})}


@pytest.mark.parametrize("form", ["parquet", "arrow stream"])  # JSON keeps objects as they are
def test_a_field_of_one_message_is_not_a_field_of_the_other_messages(tmp_path: Path, form: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    messages = [
        *CHATS[0]["messages"][:2],
        call,
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
    (row,) = _read(_write(tmp_path, form, [{"messages": messages}]))
    assert isinstance(row, Conversation)
    assert row.messages == messages


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def _tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


UNLIKE_CALLS: Rows = [
    {
        "messages": [{"role": "user", "content": "?"}, _call("weather", city="Paris")],
        "tools": [_tool("weather", city={"type": "string"})],
    },
    {
        "messages": [{"role": "user", "content": "?"}, _call("add", a=1, b=2)],
        "tools": [_tool("add", a={"type": "number", "minimum": 0}, b={"type": "number"})],
    },
    {"messages": [{"role": "user", "content": "?"}, _call("add", a=0.5, b=2)], "tools": [_tool("add")]},
]


@EVERY_FORMAT_WITH_LISTS
def test_tool_calls_and_schemas_of_unlike_keys_are_the_same_in_every_format(tmp_path: Path, form: str) -> None:
    rows = [row for row in _read(_write(tmp_path, form, UNLIKE_CALLS)) if isinstance(row, Conversation)]
    assert [{"messages": row.messages, "tools": row.tools} for row in rows] == UNLIKE_CALLS


SHAREGPT: Rows = [
    {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Hi"},
            {"from": "human", "value": "1 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "It is 3."},
        ],
    }
]


@EVERY_FORMAT_WITH_LISTS
def test_sharegpt_is_a_conversation(tmp_path: Path, form: str) -> None:
    (row,) = _read(_write(tmp_path, form, SHAREGPT))
    assert isinstance(row, Conversation)
    roles = ["system", "user", "assistant", "user", "assistant", "tool", "assistant"]
    assert [message["role"] for message in row.messages] == roles
    assert row.messages[0]["content"] == "Be brief."
    assert row.messages[4]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


@pytest.mark.parametrize("speaker", ["someone", ["human"], None])
def test_a_speaker_that_sharegpt_does_not_know_is_refused(tmp_path: Path, speaker: Any) -> None:
    path = _write(tmp_path, "jsonl", [{"conversations": [{"from": speaker, "value": "a"}]}])
    assert "field 'conversations', message 1, `from`: expected one of human, user, gpt" in _error(path)


@EVERY_FORMAT
def test_alpaca_is_a_pair(tmp_path: Path, form: str) -> None:
    alpaca = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "a", "input": "", "output": "b"},
    ]
    rows = _read(_write(tmp_path, form, alpaca))
    assert rows == [TextPair(prompt="Add.\n\n1 and 2", completion="3"), TextPair(prompt="a", completion="b")]


def test_an_alpaca_row_with_a_history_is_refused(tmp_path: Path) -> None:
    row = {"instruction": "a", "output": "b", "history": [["c", "d"]]}
    assert "field 'history': write such rows as conversations" in _error(_write(tmp_path, "jsonl", [row]))


@EVERY_FORMAT_WITH_LISTS
def test_a_turn_of_weight_0_is_not_learned(tmp_path: Path, form: str) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    weighted: Rows = [messages[0], messages[1] | {"weight": 0}, messages[2], messages[3] | {"weight": 1}]
    (row,) = _read(_write(tmp_path, form, [{"messages": weighted}]))
    assert isinstance(row, Conversation)
    assert (row.messages, row.unlearned) == (messages, frozenset({1}))


def test_the_first_row_that_can_be_read_tells_the_form(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" + json.dumps(CHATS[0]) + "\n" + json.dumps(CHATS[1]))
    kinds = [type(row) for row in open_source(Source(path=str(path)), "train", Columns()).rows]
    assert kinds == [Refused, Conversation, Conversation]


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 31), b"bytes"], ids=["a date", "bytes"])
def test_values_that_json_has_not_are_refused_in_tool_calls_and_tools(tmp_path: Path, value: Any) -> None:
    user = {"role": "user", "content": "?"}
    path = _write(tmp_path, "parquet", [{"messages": [user, _call("add", a=value)]}])
    assert "message 2, tool_calls: expected values as in JSON" in _error(path)
    answer = {"role": "assistant", "content": "x"}
    path = _write(tmp_path, "parquet", [{"messages": [user, answer], "tools": [_tool("add", a=value)]}])
    assert "field 'tools': expected values as in JSON" in _error(path)


def test_functions_of_openais_older_form_are_tools(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
    ]
    (row,) = _read(_write(tmp_path, "jsonl", [{"messages": messages, "functions": [{"name": "f"}]}]))
    assert isinstance(row, Conversation)
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]


def test_the_number_0_is_a_text_too(tmp_path: Path) -> None:
    path = _write(tmp_path, "jsonl", [{"instruction": "Add 1.", "input": 0, "output": 1}])
    assert _read(path) == [TextPair(prompt="Add 1.\n\n0", completion="1")]


def test_fields_of_sharegpt_turns_are_kept(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "reasoning_content": "since", "weight": 1}]
    (row,) = _read(_write(tmp_path, "jsonl", [{"conversations": turns}]))
    assert isinstance(row, Conversation)
    assert row.messages[1] == {"role": "assistant", "content": "b", "reasoning_content": "since"}


def test_a_damaged_zipped_file_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "jsonl, zipped", PAIRS)
    whole = path.read_bytes()
    for content in (whole[:-12], b"{}", whole[:20] + b"xxxx" + whole[24:]):
        path.write_bytes(content)
        assert _error(path).startswith(f"{path}: cannot be read")


def test_a_row_that_has_prompt_completion_and_messages_is_a_pair(tmp_path: Path) -> None:
    path = _write(tmp_path, "jsonl", [PAIRS[0] | CHATS[0]])
    assert _read(path) == _as_rows(PAIRS[:1])


def test_a_row_with_a_prompt_but_no_completion_and_messages_is_a_conversation(tmp_path: Path) -> None:
    (row,) = _read(_write(tmp_path, "jsonl", [{"prompt": "a topic"} | CHATS[0]]))
    assert isinstance(row, Conversation)


def test_tools_may_be_a_list_or_its_json(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    path = _write(
        tmp_path, "jsonl", [CHATS[0] | {"tools": value} for value in (tools, json.dumps(tools), None, [], "")]
    )
    rows = [row for row in _read(path) if isinstance(row, Conversation)]
    assert [row.tools for row in rows] == [tools, tools, None, None, None]


@pytest.mark.parametrize("tools", ["add", "[1]", {"name": "add"}])
def test_tools_of_another_kind_are_refused(tmp_path: Path, tools: object) -> None:
    path = _write(tmp_path, "jsonl", [CHATS[0] | {"tools": tools}])
    assert _error(path).startswith(f"{path}, line 1, field 'tools': ")


def test_objects_that_datasets_stores_as_json_are_objects(tmp_path: Path) -> None:
    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "say", "arguments": {"text": ["x"]}}]
    messages = [CHATS[0]["messages"][1], {"role": "assistant", "content": "", "tool_calls": calls}]
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    saved = datasets.Dataset.from_list([{"messages": messages}], features=features)
    saved.save_to_disk(tmp_path / "saved")
    saved.to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        (row,) = _read(path)
        assert isinstance(row, Conversation)
        assert row.messages == messages


@sweep("form", ["parquet", "arrow stream", "arrow file"])
def test_a_file_may_be_one_large_batch(tmp_path: Path, form: str) -> None:
    table = pa.table({"prompt": list(map(str, range(2500))), "completion": ["c"] * 2500})
    path = tmp_path / WRITERS[form][0]
    if form == "parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_stream if form == "arrow stream" else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    rows = [row for row in _read(path) if isinstance(row, TextPair)]
    assert [row.prompt for row in rows] == list(map(str, range(2500)))
    assert rows[2100].where == f"{path}, row 2101"


def test_text_is_kept_to_the_character(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": " né\\n", "completion": "\\ud83d\\ude00\\t 😀 "}'.encode())
    assert _read(path) == [TextPair(prompt=" né\n", completion="😀\t 😀 ")]


def test_a_csv_cell_may_be_longer_than_a_megabyte(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 1_000_001, "completion": "y"}]
    assert _read(_write(tmp_path, "csv", rows)) == _as_rows(rows)


def test_a_row_names_its_place_in_the_file(tmp_path: Path) -> None:
    places = {form: [row.where for row in _read(_write(tmp_path, form, PAIRS))] for form in WRITERS}
    assert places["jsonl"] == [f"{tmp_path}/rows.jsonl, line {number}" for number in range(1, 16)]
    assert places["csv"][:4] == [f"{tmp_path}/rows.csv, line {number}" for number in (2, 3, 5, 7)]
    for form in ("json array", "parquet", "arrow stream", "arrow file"):
        assert places[form] == [f"{tmp_path}/{WRITERS[form][0]}, row {number}" for number in range(1, 16)]


def test_rows_are_read_piece_by_piece(tmp_path: Path) -> None:
    for form in ("jsonl", "csv"):
        path = _write(tmp_path, form, PAIRS)
        path.write_bytes(path.read_bytes() + b'\n{"')
        rows = open_source(Source(path=str(path)), "train", Columns()).rows
        assert next(iter(rows)) == _as_rows(PAIRS)[0]


# --- folders ---

SHARDS = sweep("form", ["jsonl", "parquet", "json array", "csv", "arrow stream"], check=2)  # each is another builder


@SHARDS
def test_a_folder_of_shards_is_its_files_in_order(tmp_path: Path, form: str) -> None:
    suffix = Path(WRITERS[form][0]).suffix
    for number in range(3):
        WRITERS[form][1](tmp_path / f"train-0000{number}-of-00003{suffix}", PAIRS[5 * number : 5 * number + 5])
    assert _read(tmp_path) == _as_rows(PAIRS)


@SHARDS
def test_a_folders_splits_are_told_apart(tmp_path: Path, form: str) -> None:
    suffix = Path(WRITERS[form][0]).suffix
    WRITERS[form][1](tmp_path / f"train{suffix}", PAIRS[:2])
    WRITERS[form][1](tmp_path / f"test{suffix}", PAIRS[2:3])
    assert _read(tmp_path, "train") == _as_rows(PAIRS[:2])
    assert _read(tmp_path, "test") == _as_rows(PAIRS[2:3])
    assert _read(tmp_path, "train", split="test") == _as_rows(PAIRS[2:3])
    assert "expected a split of train, test, got 'dev'" in _error(tmp_path, split="dev")


def test_a_folder_with_one_split_gives_it_for_evaluation_too(tmp_path: Path) -> None:
    _write(tmp_path, "jsonl", PAIRS)
    assert _read(tmp_path, "test") == _as_rows(PAIRS)


def test_a_folders_subset_is_the_one_its_readme_names(tmp_path: Path) -> None:
    _jsonl(tmp_path / "a.jsonl", PAIRS[:1])
    _jsonl(tmp_path / "b.jsonl", PAIRS[1:2])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert _read(tmp_path, subset="b") == _as_rows(PAIRS[1:2])
    assert str(tmp_path) in _error(tmp_path)
    assert str(tmp_path) in _error(tmp_path, subset="c")


def test_a_data_set_that_was_saved_is_read(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(PAIRS)
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    assert _read(tmp_path / "one") == _as_rows(PAIRS)
    saved.select([4, 1]).save_to_disk(tmp_path / "selected")
    assert _read(tmp_path / "selected") == _as_rows([PAIRS[4], PAIRS[1]])


def test_a_data_set_that_was_saved_in_splits_is_read(tmp_path: Path) -> None:
    splits = {"train": datasets.Dataset.from_list(PAIRS[:2]), "test": datasets.Dataset.from_list(CHATS)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    assert _read(tmp_path, "train") == _as_rows(PAIRS[:2])
    assert len(_read(tmp_path, "test")) == 7
    assert "expected a split of train, test, got 'dev'" in _error(tmp_path, split="dev")


def test_a_folder_without_a_file_of_rows_is_refused(tmp_path: Path) -> None:
    endings = ", ".join(READERS)
    assert _error(tmp_path).startswith(f"{tmp_path}: expected a folder with files that end in {endings}")
    (tmp_path / "notes.md").write_text("nothing")
    assert _error(tmp_path) == f"{tmp_path}/notes.md: expected a file that ends in {endings}"


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("text")
    assert "train.txt: expected a file that ends in .jsonl" in _error(tmp_path)


def test_a_folder_of_two_formats_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, "jsonl", PAIRS)
    _write(tmp_path, "parquet", PAIRS)
    assert "would be left out beside" in _error(tmp_path)


def test_hidden_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    _write(tmp_path, "jsonl", PAIRS)
    (tmp_path / ".rows.csv").write_text("x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "rows.csv").write_text("x")
    assert _read(tmp_path) == _as_rows(PAIRS)


def test_an_empty_file_of_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    _jsonl(tmp_path / "train-0.jsonl", PAIRS)
    (tmp_path / "train-1.jsonl").touch()
    assert _error(tmp_path) == f"{tmp_path}/train-1.jsonl: expected rows, got an empty file"


def test_a_saved_data_set_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path)
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        for bad in (content[:20], b"", b"[]"):
            file.write_bytes(bad)
            if file.name != "dataset_info.json":
                assert str(tmp_path) in _error(tmp_path)
        file.write_bytes(content)
    assert _read(tmp_path) == _as_rows(PAIRS)


# --- bad input ---


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.touch()
    assert _error(path) == f"{path}: expected rows, got an empty file"


@EVERY_FORMAT
def test_a_file_without_rows_is_refused(tmp_path: Path, form: str) -> None:
    path = _write(tmp_path, form, PAIRS)
    zipped = path.suffix == ".gz"
    content = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    if form in TEXT_ONLY:
        path.write_bytes(content.split(b"\r\n", 1)[0] + b"\r\n")
    elif path.suffix in {".parquet", ".arrow"}:
        schema = pa.Table.from_pylist(PAIRS).schema
        if form == "parquet":
            pq.write_table(schema.empty_table(), path)
        else:
            new = pa.ipc.new_stream if form == "arrow stream" else pa.ipc.new_file
            new(str(path), schema).close()
    else:
        path.write_bytes(b"[\n]\n" if form.startswith("json array") else b"\n \n")
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert _error(path) == f"{path}: expected rows, got none"


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("text")
    assert _error(path) == f"{path}: expected a file that ends in {', '.join(READERS)}"


@sweep("form", ["parquet", "arrow stream", "arrow file"])
def test_a_file_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path, form: str) -> None:
    path = _write(tmp_path, form, PAIRS)
    content = path.read_bytes()
    for length in range(1, len(content), 11):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=f"^{path}: "):
            list(read_file(path))


def test_an_arrow_stream_cut_between_its_batches_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "arrow stream", PAIRS)
    table = pa.Table.from_pylist(PAIRS)
    whole = path.read_bytes()
    sizes = []
    for count in (4, 8):
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table[:count], max_chunksize=4)
        sizes.append(len(sink.getvalue()) - 8)  # without its end mark
    for size in (*sizes, len(whole) - 8):
        path.write_bytes(whole[:size])
        assert _error(path) == f"{path}: expected a complete Arrow file, got one without an end mark"


@sweep("form", ["arrow stream", "arrow file", "parquet"])
def test_a_damaged_file_is_refused_or_read_and_never_ends_the_process(tmp_path: Path, form: str) -> None:
    path = _write(tmp_path, form, PAIRS)
    content = path.read_bytes()
    for place in range(0, len(content), 13):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xE6]) + content[place + 1 :])
        try:
            list(read_file(path))
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017


def test_text_of_arrow_or_parquet_that_is_not_utf_8_is_refused_with_row_and_field(tmp_path: Path) -> None:
    text = pa.array([b"fine", b"fine", b"\xff\xfe"]).cast(pa.binary())
    table = pa.table({"prompt": ["a"] * 3, "completion": pa.Array.from_buffers(pa.string(), 3, text.buffers())})
    with pa.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    pq.write_table(table, tmp_path / "rows.parquet")
    for name in ("rows.arrow", "rows.parquet"):
        message = _error(tmp_path / name)
        assert message.startswith(f"{tmp_path / name}, row 3, field 'completion': ")
        assert "UTF8" in message


def test_a_date_that_python_does_not_have_is_refused_with_row_and_field(tmp_path: Path) -> None:
    times = pa.array([0, 2**61]).cast(pa.timestamp("ms"))
    pq.write_table(pa.table({"prompt": ["a"] * 2, "completion": ["b"] * 2, "time": times}), tmp_path / "rows.parquet")
    assert _error(tmp_path / "rows.parquet").startswith(f"{tmp_path}/rows.parquet, row 2, field 'time': cannot be read")


def test_json_cells_that_are_nested_too_deeply_are_refused_with_row_and_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    cells = pa.array(["[]", "[" * 100_000 + "]" * 100_000], pa.json_())
    pq.write_table(pa.table({"prompt": ["a"] * 2, "completion": ["b"] * 2, "extra": cells}), path)
    assert _error(path).startswith(f"{path}, row 2, field 'extra': cannot be read: ")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["prompt", "completion", "prompt"]
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        path = tmp_path / name
        assert _error(path) == f"{path}, field 'prompt': expected one column of this name, got two"


def test_a_column_of_lists_is_refused_with_row_and_field(tmp_path: Path) -> None:
    path = _write(tmp_path, "jsonl", [{"prompt": ["a", "b"], "completion": ["c"]}])
    found = "expected a text, got a list of str; write such a value as JSON in a text"
    assert _error(path) == f"{path}, line 1, field 'prompt': {found}"


@EVERY_FORMAT
def test_numbers_are_texts(tmp_path: Path, form: str) -> None:
    path = _write(tmp_path, form, [{"prompt": "1 + 2", "completion": 3}, {"prompt": "2 + 2", "completion": 4}])
    assert [row.completion for row in _read(path) if isinstance(row, TextPair)] == ["3", "4"]


@EVERY_FORMAT
def test_a_number_is_the_same_text_beside_fractions(tmp_path: Path, form: str) -> None:
    answers = (3, 4.5, 1e300)
    path = _write(tmp_path, form, [{"prompt": "?", "completion": answer} for answer in answers])
    texts = [row.completion for row in _read(path) if isinstance(row, TextPair)]
    assert texts == ["3", "4.5", "1e+300"]


def test_mixed_types_are_refused_at_the_row_that_differs(tmp_path: Path) -> None:
    path = _write(tmp_path, "json array", [*PAIRS[:2], {"prompt": "a", "completion": ["3"]}])
    found = "expected a text, got a list of str; write such a value as JSON in a text"
    assert _error(path) == f"{path}, row 3, field 'completion': {found}"


def test_pairs_among_conversations_are_refused_and_conversations_among_pairs(tmp_path: Path) -> None:
    path = _write(tmp_path, "jsonl", [CHATS[0], PAIRS[0]])
    assert _error(path).startswith(f"{path}, line 2: field 'messages' is missing")
    path = _write(tmp_path, "jsonl", [PAIRS[0], CHATS[0]])
    assert _error(path).startswith(f"{path}, line 2: field 'prompt' is missing")


def _text_cases() -> Iterator[Any]:
    good = '{"prompt": "a", "completion": "b"}'
    header = "prompt,completion\n"
    malformed = ": expected JSON objects, got malformed JSON"
    cases: dict[str, tuple[str, str | bytes, str]] = {
        "JSON: a key twice": (
            "rows.json",
            f'[{good}, {{"prompt": "a", "prompt": "b"}}]',
            ", field 'prompt': expected once in an object, got twice in [('prompt', 'a'), ('prompt', 'b')]",
        ),
        "JSONL: a key twice": (
            "rows.jsonl",
            f'{good}\n{{"prompt": "a", "prompt": "b"}}',
            ", line 2, field 'prompt': expected once in an object, got twice",
        ),
        "JSONL: a message's key twice": (
            "rows.jsonl",
            '{"messages": [{"role": "user", "role": "user", "content": "x"}]}',
            ", line 1, field 'role': expected once in an object, got twice",
        ),
        "JSON: cut short": (
            "rows.json",
            f'[{good},\n{{"prompt": "a", "com',
            ": expected JSON objects, got malformed JSON: Unterminated string starting at: line 2, column 17",
        ),
        "JSON: not closed": ("rows.json", f"[{good}\n", f"{malformed}: Expecting ',' delimiter: line 2, column 1"),
        "JSON: no comma": ("rows.json", f"[{good} {good}]", f"{malformed}: Expecting ',' delimiter: column 37"),
        "JSON: a comma too many": ("rows.json", f"[{good},]", malformed),
        "JSON: a second array": ("rows.json", f"[{good}]\n[]", f"{malformed}: Extra data: line 2, column 1"),
        "JSON: a bracket alone": ("rows.json", "[", malformed),
        "JSON: numbers": ("rows.json", f"[{good}, 3]", ", row 2: expected one JSON object, got int"),
        "JSON: one object over lines": ("rows.json", '{\n "prompt": "a"}', ", line 1: expected JSON objects"),
        "JSON: not UTF-8": (
            "rows.json",
            b'[{"prompt": "\xff"}]',
            ": expected UTF-8, got invalid start byte at byte 13",
        ),
        "JSON: deep": ("rows.json", "[" * 100_000, malformed),
        "JSONL: a long number": (
            "rows.jsonl",
            '{"prompt": ' + "9" * 5000 + "}",
            ", line 1: expected JSON objects, got malformed JSON: Exceeds the limit",
        ),
        "JSONL: UTF-16": ("rows.jsonl", good.encode("utf-16"), ", line 1: expected UTF-8"),
        "CSV: too few fields": (
            "rows.csv",
            f"{header}a,b\nc\n",
            ", line 3: expected 2 fields, as in the header, got 1",
        ),
        "CSV: too many fields": (
            "rows.csv",
            f'{header}"a\nb",b\nc,d,e\n',
            ", line 4: expected 2 fields, as in the header, got 3",
        ),
        "CSV: a name twice": (
            "rows.csv",
            "prompt,completion,prompt\na,b,c\n",
            ", line 1, field 'prompt': expected once in the header, got twice",
        ),
        "CSV: an open quote": (
            "rows.csv",
            f'{header}a,b\nc,"d\ne,f\n',
            ", line 3: expected CSV, in which a cell that holds quotes is quoted",
        ),
        "CSV: text after a quote": (
            "rows.csv",
            f'{header}"a"b,c\n',
            ", line 2: expected CSV, in which a cell that holds quotes is quoted: ",
        ),
        "CSV: not UTF-8": (
            "rows.csv",
            f"{header}a,b\n".encode() + b"c,\xe9\n",
            ", line 3, field 'completion': expected UTF-8 text",
        ),
        "CSV: an empty cell": (
            "rows.csv",
            f"{header}a,\n",
            ", line 2, field 'completion': expected text, got an empty",
        ),
        "CSV: no such column": ("rows.csv", "q,a\n1,2\n", ", line 2: field 'prompt' is missing; the row has 'q', 'a'"),
        "CSV: other separators": ("rows.csv", "prompt;completion\n1;2\n", ", line 2: field 'prompt' is missing"),
        "Parquet: text": ("rows.parquet", good, ": expected a complete Parquet file: "),
        "Arrow: text": ("rows.arrow", good, ": expected a complete Arrow file, got one without an end mark"),
    }
    for name, (file, content, expected) in cases.items():
        yield pytest.param(file, content.encode() if isinstance(content, str) else content, expected, id=name)


@pytest.mark.parametrize(("file", "content", "expected"), _text_cases())
def test_bad_content_is_an_error_that_names_file_row_and_field(
    tmp_path: Path, file: str, content: bytes, expected: str
) -> None:
    path = tmp_path / file
    path.write_bytes(content)
    assert _error(path).startswith(f"{path}{expected}")


@pytest.mark.parametrize("space", [b"\r\n\t " * 3000, b"\xef\xbb\xbf" + b"\n " * 5000])
def test_a_json_array_may_come_after_any_white_space(tmp_path: Path, space: bytes) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(space + b'[{"prompt": "a",\n"completion": "b"}]')
    assert _read(path) == [TextPair(prompt="a", completion="b")]


def test_an_unused_csv_column_may_hold_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion,\xff\na,b,\xe9\n")
    assert _read(path) == [TextPair(prompt="a", completion="b")]


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "jsonl", PAIRS)
    rows = open_source(Source(path=str(path)), "train", Columns()).rows
    path.unlink()  # permissions do not stop root, so the file is missing instead
    with pytest.raises(InputError, match=f"^{path}: cannot be read: "):
        list(rows)


def test_reading_a_file_gives_its_fields_as_they_stand(tmp_path: Path) -> None:
    path = _write(tmp_path, "jsonl", [{"id": 3, "tags": [None]}])
    assert list(read_file(path)) == [("line 1", {"id": 3, "tags": [None]})]
