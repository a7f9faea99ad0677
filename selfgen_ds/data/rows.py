"""One door for data: a JSONL file or a built-in task, as validated rows of text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from selfgen_ds.config import InputError
from selfgen_ds.data.tasks import TASKS, Row, generate

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 cannot


def read_rows(source: str, split: str, prompt_column: str, completion_column: str) -> Iterator[Row]:
    """Rows of `source`, in order.

    Args:
        source: Path of a JSONL file (one object a line; UTF-8), or `builtin:<task>`.
        split: `train` or `test`; chooses the set of a built-in task, a file is one set.
        prompt_column: Field with the prompt, a non-empty string.
        completion_column: Field with the completion, a non-empty string.

    Raises:
        InputError: Names file, line, field and what was expected.
    """
    if source.startswith("builtin:"):
        task = source.removeprefix("builtin:")
        if task not in TASKS:
            raise InputError(f"{source}: unknown task; known are {', '.join(sorted(TASKS))}")
        yield from generate(task, split)
    else:
        yield from _read_jsonl(source, prompt_column, completion_column)


def _read_jsonl(path: str, prompt_column: str, completion_column: str) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: expected UTF-8, got {error.reason} at byte {error.start}") from error
            except json.JSONDecodeError as error:
                at = f"{error.msg} at column {error.colno}"
                raise InputError(f"{where}: expected one JSON object, got malformed JSON: {at}") from error
            except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
                raise InputError(f"{where}: expected one JSON object, got malformed JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected one JSON object, got {type(row).__name__}")
            for column in (prompt_column, completion_column):
                if column not in row:
                    raise InputError(f"{where}: field {column!r} is missing; the row has {', '.join(map(repr, row))}")
                if not isinstance(row[column], str):
                    raise InputError(f"{where}, field {column!r}: expected a string, got {type(row[column]).__name__}")
                if not row[column]:
                    raise InputError(f"{where}, field {column!r}: expected text, got an empty string")
                if not row[column].isascii() and _SURROGATE.search(row[column]):
                    raise InputError(f"{where}, field {column!r}: expected text, got half a surrogate pair")
            yield Row(prompt=row[prompt_column], completion=row[completion_column], where=f"line {number}")
