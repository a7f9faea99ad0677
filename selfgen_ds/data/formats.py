"""Files -> rows as they stand, one reader a format. Each says where in the file a row was, and what is broken there.

JSONL, CSV, Parquet and Arrow are read piece by piece, a JSON array as a whole.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfgen_ds.errors import InputError

Raw = tuple[str, dict[str, Any]]
"""Where the row was (`line 3`), and its fields."""

csv.field_size_limit(sys.maxsize)  # of the whole process; the default of 128 KiB is less than a long document


def read_file(path: Path) -> Iterator[Raw]:
    """Rows of a file, in order; its suffix tells the format.

    Raises:
        InputError: Names file, line or row, and what was expected.
    """
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {_first_line(error)}") from error


def _read_jsonl(path: Path) -> Iterator[Raw]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                at = f"{path}, line {number}"
                row, _ = _parse(_decode(line, at, starts_file=number == 1), 0, at)
                yield f"line {number}", _object(row, at)


def _read_json(path: Path) -> Iterator[Raw]:
    """An array of objects; or, as many files of this name are, one object a line."""
    with open(path, "rb") as file:
        first_line = next((rest for line in file if (rest := line.removeprefix(b"\xef\xbb\xbf").strip())), b"")
    if not first_line.startswith(b"["):
        yield from _read_jsonl(path)
        return
    text = _decode(path.read_bytes(), str(path), starts_file=True)
    position = _past_space(text, text.index("[") + 1)
    number = 0
    more = text[position : position + 1] != "]"
    while more:
        number += 1
        at = f"{path}, row {number}"
        row, position = _parse(text, position, at, alone=False)
        yield f"row {number}", _object(row, at)
        behind = text[position : position + 1]
        if behind not in {",", "]"}:
            raise InputError(f"{at}: malformed JSON: expected a comma or the end of the array behind it")
        more = behind == ","
        position += more
    if text[position + 1 :].strip():
        raise InputError(f"{path}: malformed JSON: expected nothing behind the array")


def _decode(text: bytes, where: str, *, starts_file: bool) -> str:
    try:
        return text.decode("utf-8-sig" if starts_file else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: expected UTF-8, got {error.reason} at byte {error.start}") from error


def _parse(text: str, position: int, where: str, *, alone: bool = True) -> tuple[Any, int]:
    """The value at a position, and the position behind it and the white space that follows.

    Args:
        alone: Nothing else may follow.
    """
    expected = f"{where}: expected JSON objects, got malformed JSON"
    try:
        value, end = _JSON.raw_decode(text, _past_space(text, position))
        end = _past_space(text, end)
        if alone and end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        line = "" if error.lineno == 1 else f"line {error.lineno}, "
        raise InputError(f"{expected}: {error.msg} at {line}column {error.colno}") from error
    except _DuplicateError as error:
        raise InputError(f"{where}, field {str(error)!r}: comes twice") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
        raise InputError(f"{expected}: {error}") from error
    return value, end


def _past_space(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    assert space is not None
    return space.end()


class _DuplicateError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise _DuplicateError(_twice(name for name, _ in pairs))
    return result


_JSON = json.JSONDecoder(object_pairs_hook=_unique)
_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's


def _twice(names: Iterable[str]) -> str | None:
    """The first name that comes more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected one JSON object, got {type(row).__name__}")
    return row


def _read_csv(path: Path) -> Iterator[Raw]:
    """Comma-separated, the first line names the columns. Every cell is text."""
    # bytes that are not UTF-8 come through as lone surrogates, so that whoever uses the cell can name its row
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            first = lines.line_num + 1
            try:
                cells = next(lines, None)
            except csv.Error as error:
                raise InputError(f"{path}, line {first}: malformed CSV: {error}") from error
            if cells is None:
                return
            if not cells:
                continue
            if header is None:
                header = cells
                if (name := _twice(header)) is not None:
                    raise InputError(f"{path}, line {first}, field {name!r}: the header names it twice")
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{path}, line {first}: expected {len(header)} fields, as in the header, got {len(cells)}"
                )
            yield f"line {first}", dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[Raw]:
    try:
        with pq.ParquetFile(path) as file:
            yield from _read_batches(path, file.schema_arrow, file.iter_batches(batch_size=1000))
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter: names of columns
        raise InputError(f"{path}: not a whole Parquet file: {_first_line(error)}") from error


_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def _read_arrow(path: Path) -> Iterator[Raw]:
    """Arrow's stream format, as `datasets` writes it, or its file format."""
    try:
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                with pa.ipc.open_file(file) as reader:
                    batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
                    yield from _read_batches(path, reader.schema, batches)
            else:
                file.seek(max(0, file.size() - len(_END_OF_STREAM)))
                if file.read() != _END_OF_STREAM:  # the reader takes a stream that is cut between batches as it is
                    raise InputError(f"{path}: not a whole Arrow file: it has no end mark")
                file.seek(0)
                with pa.ipc.open_stream(file) as reader:
                    yield from _read_batches(path, reader.schema, reader)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a whole Arrow file: {_first_line(error)}") from error


def _read_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[Raw]:
    if (name := _twice(schema.names)) is not None:
        raise InputError(f"{path}, field {name!r}: the file has two columns of that name")
    number = 0
    for batch in batches:
        for start in range(0, len(batch), 1000):  # a file may be one large batch
            part = batch.slice(start, 1000)
            for row in _python_rows(part, f"{path}, row", number):
                number += 1
                yield f"row {number}", row


def _python_rows(part: pa.RecordBatch, where: str, before: int) -> list[dict[str, Any]]:
    names = part.schema.names
    try:
        columns = [_python_values(part.column(name)) for name in names]
    except _UNREADABLE:
        for i, name in ((i, name) for i in range(len(part)) for name in names):
            try:
                _python_values(part.column(name).slice(i, 1))
            except _UNREADABLE as error:
                at = f"{where} {before + i + 1}, field {name!r}"
                raise InputError(f"{at}: cannot be read: {_first_line(error)}") from error
        raise
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


_UNREADABLE = (pa.ArrowException, ValueError, OverflowError)  # damaged, no UTF-8, a date that Python does not have


def _python_values(column: pa.Array) -> list[Any]:
    column.validate(full=True)  # damaged offsets would read outside the file
    values = column.to_pylist()
    return [_from_json(value, column.type) for value in values] if _has_json(column.type) else values


def _has_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.JsonType) or any(_has_json(kind.field(i).type) for i in range(kind.num_fields))


def _from_json(value: Any, kind: pa.DataType) -> Any:
    """Values of Arrow's JSON type come as text. `datasets` uses it for objects that are not alike."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {name: _from_json(part, kind.field(name).type) for name, part in value.items()}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_from_json(part, kind.value_type) for part in value]
    return value


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
