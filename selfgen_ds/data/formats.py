"""Readers of data files: one function per format that yields the rows as the file holds them.

Every reader tells the line or number of a row, and names what is broken there. A JSON array is read as a whole, all
other files piece by piece.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import reprlib
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from selfgen_ds.errors import InputError

RawRow = tuple[str, dict[str, Any] | InputError]
"""The line or number of a row in its file, such as `line 3`, and the row's fields or why it has none."""

csv.field_size_limit(sys.maxsize)  # for the whole process; the default of 128 KiB is less than a long document


def read_file(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a file in order. The suffix tells the format.

    Raises:
        InputError: The file cannot be read. The message names the file, the line or row, and the expected content.
    """
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: expected rows, got an empty file")
        yield from READERS[suffix(path)](path)
    except (OSError, EOFError, zlib.error) as error:  # the last two come of damaged gzip files
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error


def suffix(path: Path) -> str:
    """Return the end of a file's name that tells the format, such as `.jsonl.gz`."""
    ends = path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]
    return "".join(ends).lower()


def _open(path: Path) -> IO[bytes]:
    """Open a file, or what a compressed file holds."""
    return cast("IO[bytes]", gzip.open(path)) if path.suffix.lower() == ".gz" else open(path, "rb")


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                fields: dict[str, Any] | InputError
                try:
                    fields = _json_object(_parse_json(line.rstrip(b"\n"), where), where)
                except InputError as error:
                    fields = error
                yield f"line {number}", fields


def _read_json(path: Path) -> Iterator[RawRow]:
    """Read an array of objects or, as in many files of this suffix, one object per line."""
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="replace") as file:
        while (start := file.read(1)).isspace():
            pass
    if start != "[":
        yield from _read_jsonl(path)
        return
    with _open(path) as content:
        rows = _parse_json(content.read(), str(path))
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield f"row {number}", row if isinstance(row, dict) else InputError(_no_object(row, where))


def _parse_json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: expected UTF-8, got {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        line = "" if error.lineno == 1 else f"line {error.lineno}, "
        reason = f"{error.msg}: {line}column {error.colno}"
        raise InputError(f"{where}: expected JSON objects, got malformed JSON: {reason}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets nested too deeply
        raise InputError(f"{where}: expected JSON objects, got malformed JSON: {error}") from error
    except InputError as error:
        raise InputError(f"{where}, {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its members; Python by itself would silently keep the last of two equal keys."""
    if (key := _duplicate(key for key, _ in pairs)) is not None:
        raise InputError(f"field {key!r}: expected once in an object, got twice in {reprlib.repr(pairs)}")
    return dict(pairs)


def _duplicate(names: Iterable[str]) -> str | None:
    """Return the first name that occurs more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _json_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(_no_object(row, where))
    return row


def _no_object(row: Any, where: str) -> str:
    return f"{where}: expected one JSON object, got {type(row).__name__}"


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[RawRow]:
    """Read separated values. The first line names the columns, and every cell is text."""
    # A byte that is not UTF-8 becomes a lone surrogate, so that the check of the cell can name row and field.
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True, delimiter=delimiter)
        header: list[str] = []
        start = 1  # the line on which the next row starts
        try:
            for cells in rows:
                where = f"{path}, line {start}"
                if not header:
                    header = cells
                    if (name := _duplicate(header)) is not None:
                        raise InputError(f"{where}, field {name!r}: expected once in the header, got twice")
                elif cells:
                    if len(cells) == len(header):
                        yield f"line {start}", dict(zip(header, cells, strict=True))
                    else:
                        problem = f"{where}: expected {len(header)} fields, as in the header, got {len(cells)}"
                        yield f"line {start}", InputError(problem)
                start = rows.line_num + 1
        except csv.Error as error:
            kind = "TSV" if delimiter == "\t" else "CSV"
            problem = f"expected {kind}, in which a cell that holds quotes is quoted: {error}"
            raise InputError(f"{path}, line {start}: {problem}") from error


def _read_parquet(path: Path) -> Iterator[RawRow]:
    try:
        with pq.ParquetFile(path) as file:
            yield from _read_batches(path, file.schema_arrow, file.iter_batches(batch_size=_BATCH))
    except (pa.ArrowException, UnicodeDecodeError) as error:  # a column's name may not be UTF-8
        raise InputError(f"{path}: expected a complete Parquet file: {first_line(error)}") from error


def _read_arrow(path: Path) -> Iterator[RawRow]:
    """Read Arrow's stream format, which `datasets` writes, or Arrow's file format."""
    try:
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                with pa.ipc.open_file(file) as reader:
                    batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
                    yield from _read_batches(path, reader.schema, batches)
            else:
                file.seek(max(0, file.size() - len(_END_OF_STREAM)))
                if file.read() != _END_OF_STREAM:  # pyarrow accepts a stream that was cut between two batches
                    raise InputError(f"{path}: expected a complete Arrow file, got one without an end mark")
                file.seek(0)
                with pa.ipc.open_stream(file) as reader:
                    yield from _read_batches(path, reader.schema, reader)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a complete Arrow file: {first_line(error)}") from error


_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_BATCH = 1000  # rows that are converted to Python objects at a time


def _read_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[RawRow]:
    if (name := _duplicate(schema.names)) is not None:
        raise InputError(f"{path}, field {name!r}: expected one column of this name, got two")
    number = 0
    for batch in batches:
        for part in pa.Table.from_batches([batch]).to_batches(max_chunksize=_BATCH):  # a file may be one large batch
            try:
                rows = _python_rows(part)
            except _UNREADABLE:
                _name_unreadable_cell(part, path, number)
                raise
            for row in rows:
                number += 1
                yield f"row {number}", row


# Raised by damaged content, text that is not UTF-8, a date that Python cannot hold, and JSON nested too deeply.
_UNREADABLE = (pa.ArrowException, ValueError, OverflowError, RecursionError)


def _python_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    batch.validate(full=True)  # otherwise damaged offsets would make pyarrow read outside the file
    kind = pa.struct(list(batch.schema))
    rows = batch.to_pylist()
    return [_decode_json(row, kind) for row in rows] if _holds_json(kind) else rows


def _holds_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.JsonType) or any(_holds_json(kind.field(i).type) for i in range(kind.num_fields))


def _decode_json(value: Any, kind: pa.DataType) -> Any:
    """Replace each text of Arrow's JSON type by its value; `datasets` stores objects of unlike fields as this type.

    `datasets.Features.decode_example` does so too, but drops lone surrogates, refuses integers of more than 64 bits and
    changes the last digit of some floats.
    """
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {name: _decode_json(part, kind.field(name).type) for name, part in value.items()}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_decode_json(part, kind.value_type) for part in value]
    return value


def _name_unreadable_cell(batch: pa.RecordBatch, path: Path, rows_before: int) -> None:
    for i, name in product(range(len(batch)), batch.schema.names):
        try:
            _python_rows(batch.slice(i, 1).select([name]))
        except _UNREADABLE as error:
            where = f"{path}, row {rows_before + i + 1}, field {name!r}"
            raise InputError(f"{where}: cannot be read: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or the type's name if there is no message."""
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".tsv.gz": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
