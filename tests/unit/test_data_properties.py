"""The loader refuses malformed rows in one clear line, or accounts for every row."""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from selfgen_ds.config import Source
from selfgen_ds.data.encoding import Format
from selfgen_ds.data.row_checks import Columns
from selfgen_ds.data.rows import open_source
from selfgen_ds.data.samples import MOST_REASONS, Samples, first_rows, load_samples
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from tests.chat_tokenizers import CHATML, CHATML_GENERATION

pytestmark = pytest.mark.test  # hundreds of files are written and read

FORMATS = ["rows.jsonl", "rows.parquet", "rows.json", "lines.json", "rows.csv", "rows.arrow", "file.arrow"]
EVERY_FORMAT = pytest.mark.parametrize("name", FORMATS)

TEXT = st.text(st.characters(exclude_categories=[]), max_size=12) | st.sampled_from(["", " ", "\n", "<|im_end|>", "\0"])
GOOD_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
SCALAR = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=True) | TEXT
ANYTHING = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=6,
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "developer"]) | ANYTHING
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": ROLE, "content": TEXT | ANYTHING, "tool_calls": ANYTHING, "name": ANYTHING}
)
GOOD_MESSAGES = st.lists(st.tuples(GOOD_TEXT, GOOD_TEXT), min_size=1, max_size=3).map(
    lambda turns: [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
)
MESSAGES = GOOD_MESSAGES | st.lists(MESSAGE | ANYTHING, max_size=4) | ANYTHING
PAIR = st.fixed_dictionaries({"prompt": GOOD_TEXT, "completion": GOOD_TEXT})
CHAT = st.fixed_dictionaries({"messages": GOOD_MESSAGES})
BAD_ROW = st.fixed_dictionaries(
    {},
    optional={
        "prompt": TEXT | MESSAGES,
        "completion": TEXT | MESSAGES,
        "messages": MESSAGES,
        "tools": ANYTHING,
        "other": ANYTHING,
    },
)
ROWS = (
    st.lists(PAIR, min_size=1, max_size=6)
    | st.lists(CHAT, min_size=1, max_size=6)
    | st.lists(PAIR | BAD_ROW, max_size=4)
    | st.lists(CHAT | BAD_ROW, max_size=4)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    result = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", result / "cache")
        patch.setattr(os, "fsync", lambda _: None)  # it would take most of the time
        yield result


def _tokenizer(template: str) -> Any:
    """Return the byte tokenizer with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = [_tokenizer(CHATML), _tokenizer(CHATML_GENERATION)]


def _content(name: str, rows: list[dict[str, Any]]) -> bytes:
    """Return the content of a file of the rows; a format with a schema takes only rows that have one."""
    if name == "rows.json":
        return json.dumps(rows).encode()
    if name in {"rows.jsonl", "lines.json"}:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name == "rows.csv":
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        header = list(rows[0]) if rows else []
        writer.writerows([header, *(list(row.values()) for row in rows)])
        return text.getvalue().encode("utf-8", "surrogatepass")
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, UnicodeError, ValueError, TypeError):
        assume(False)  # values of different types in one column have no schema
    sink = io.BytesIO()
    if name == "rows.parquet":
        try:
            pq.write_table(table, sink)
        except pa.ArrowException:  # Parquet has no objects without fields
            assume(False)
    else:
        new = pa.ipc.new_stream if name == "rows.arrow" else pa.ipc.new_file
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def _load(folder: Path, name: str, content: bytes, max_length: int, template: int) -> Samples | None:
    """Return the samples of a file, or None if it is refused in lines that name it."""
    path = folder / name
    path.write_bytes(content)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    try:
        source = open_source(Source(path=str(path)), "train", Columns())
        return load_samples(source, TOKENIZERS[template], Format(max_length=max_length))
    except InputError as error:
        message = str(error)
        assert all(line.startswith(str(path)) for line in message.splitlines())
        assert len(message.splitlines()) <= 1 + MOST_REASONS
        assert message.encode()
        event("refused")
        return None


def _check_accounts(samples: Samples, max_length: int) -> None:
    used = len(samples)
    assert samples.read == used + samples.refused  # the truncated are used
    assert 0 <= samples.truncated <= used
    ids = [sample.sample_id for sample in first_rows([samples])]
    assert ids == sorted(set(ids))
    assert ids[-1] < samples.read
    for number, sample in enumerate(first_rows([samples])):
        assert 1 < len(sample) <= max_length
        last = 0
        for start, replaceable, end in samples.table[number]["turns"].reshape(-1, 3).tolist():
            assert max(last, 1) <= start <= replaceable <= end <= len(sample)
            assert start < end
            assert replaceable < len(sample)
            last = end


@EVERY_FORMAT
@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=ROWS, max_length=st.integers(2, 90), template=st.integers(0, 1))
def test_rows_are_refused_or_each_is_accounted_for(
    folder: Path, name: str, rows: list[dict[str, Any]], max_length: int, template: int
) -> None:
    samples = _load(folder, name, _content(name, rows), max_length, template)
    if samples is not None:
        event("read")
        assert samples.read == (sum(map(bool, rows)) if name == "rows.csv" else len(rows))  # a blank line is no row
        _check_accounts(samples, max_length)


@EVERY_FORMAT
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.lists(PAIR, min_size=1, max_size=4) | st.lists(CHAT, min_size=1, max_size=4),
    damage=st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=3)), min_size=1, max_size=3),
    cut=st.none() | st.integers(0, 2000),
)
def test_damaged_files_are_refused_or_each_row_is_accounted_for(
    folder: Path, name: str, rows: list[dict[str, Any]], damage: list[tuple[int, bytes]], cut: int | None
) -> None:
    content = _content(name, rows)
    for place, replacement in damage:
        place %= len(content)
        content = content[:place] + replacement + content[place + len(replacement) :]
    samples = _load(folder, name, content[: None if cut is None else cut % len(content)], 60, 0)
    if samples is not None:
        event("read")
        _check_accounts(samples, 60)


@EVERY_FORMAT
@settings(max_examples=10, deadline=None, derandomize=True)
@given(content=st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
def test_any_bytes_are_refused_or_each_row_is_accounted_for(folder: Path, name: str, content: bytes) -> None:
    start = {
        ".parquet": b"PAR1",
        ".arrow": b"ARROW1\0\0",
        ".json": b"[",
        ".jsonl": b"{",
        ".csv": b"prompt,completion\n",
    }
    for given_content in (content, start[Path(name).suffix] + content):
        samples = _load(folder, name, given_content, 60, 0)
        if samples is not None:
            event("read")
            _check_accounts(samples, 60)
