"""The rows of a pilot: a random part of the user's training rows, and rows that are held out of it.

All are written as JSONL with all of their fields, a folder per source and a file per file that it has, whose rows may
have another form, so that every run of the pilot, on whatever host, reads the same rows as the whole run would.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.config import DataConfig, Source, Sources, sources
from selfgen_ds.data.formats import RawRow
from selfgen_ds.data.order import apportion
from selfgen_ds.data.row_checks import Columns, Refused, Row, TextPair, validated
from selfgen_ds.data.rows import raw_files
from selfgen_ds.data.samples import MOST_REASONS
from selfgen_ds.data.tasks import task_of
from selfgen_ds.errors import InputError
from selfgen_ds.files import as_json, write_atomically
from selfgen_ds.progress import bar

_WRITTEN = "rows.json"


@dataclass(frozen=True, kw_only=True)
class PilotRows:
    """The files of a pilot's rows."""

    train: list[Source]
    held_out: list[Source]
    whole: int
    """Rows of the user's training data."""
    trained: int
    """Rows of `train`."""
    evaluated: int
    """Rows of `held_out`."""


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """A row that was drawn."""

    source: int
    """Number of its source."""
    file: int
    """Number of the file of the source."""
    place: int
    """Number of the row in its source."""
    fields: dict[str, Any]
    prompt: str
    """Text or messages that the model is given: rows that share them stay together."""


def draw(data: DataConfig, rows: int, held_out: int, seed: int, folder: Path) -> PilotRows:
    """Draw the rows of a pilot and write them, unless they are there.

    Held-out rows come from `data.eval` if the recipe has it, and else from the training rows; then no prompt is on both
    sides.

    Args:
        rows: Training rows.
        held_out: Rows to evaluate on.
        seed: Seed of the draw.
        folder: Folder for the files.

    Raises:
        InputError: There are fewer rows, or more rows cannot be used than `data.max_refused_share` allows.
    """
    given, given_for_eval = _sources(data.train), _sources(data.eval)
    if not (folder / _WRITTEN).exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(seed)
        from_train = 0 if data.eval is not None else held_out
        drawn, whole = _sample(given, "train", data, rows + from_train, rng)
        if len(drawn) < rows + from_train:
            parts = f"--rows {rows}" + (f" and --held_out {held_out}" if from_train else "")
            raise InputError(f"data.train: expected at least {rows + from_train} rows ({parts}), got {len(drawn)}")
        evaluated, drawn = _split(drawn, from_train) if from_train else ([], drawn)
        if data.eval is not None:
            evaluated, found = _sample(given_for_eval, "test", data, held_out, rng)
            if len(evaluated) < held_out:
                raise InputError(f"data.eval: expected at least {held_out} rows (--held_out), got {found}")
        _write(folder, "train", drawn)
        _write(folder, "held_out", evaluated)
        counts = {"whole": whole, "trained": len(drawn), "evaluated": len(evaluated)}
        write_atomically(folder / _WRITTEN, as_json(counts))
    return PilotRows(
        train=_files(folder, "train", given),
        held_out=_files(folder, "held_out", given_for_eval or given, weighted=False),
        **json.loads((folder / _WRITTEN).read_text(encoding="utf-8")),
    )


def some_rows(rows: PilotRows, count: int, folder: Path) -> list[Source]:
    """Write a part of the training rows, the same share of every source, and return it without weights.

    Args:
        count: Rows, about as many.
        folder: Folder for the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for source in rows.train:
        part = folder / Path(source.path).name
        part.mkdir(exist_ok=True)
        for file in Path(source.path).iterdir():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            chosen = lines[: math.ceil(count * len(lines) / rows.trained)]
            (part / file.name).write_text("".join(chosen), encoding="utf-8")
        sources.append(replace(source, path=str(part), weight=None))
    return sources


def _sources(value: Sources | None) -> list[Source]:
    """Return sources of which those that are built-in tasks name their fields, as files have to."""
    return [
        source
        if task_of(source.path) is None
        else replace(source, prompt_column="prompt", completion_column="completion")
        for source in sources(value)
    ]


def kinds(field: str, rows: PilotRows) -> list[str]:
    """Return the value of a field of every held-out row, in the order of their sample ids.

    Raises:
        InputError: A row has no such field.
    """
    files = [file for source in rows.held_out for file in sorted(Path(source.path).iterdir())]
    held_out = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    for row in held_out:
        if field not in row:
            has = ", ".join(row)
            raise InputError(f"--group_by: expected a field of every row, got {field!r}; a held-out row has {has}")
    return [str(row[field]) for row in held_out]


def _sample(
    given: list[Source], split: str, data: DataConfig, count: int, rng: random.Random
) -> tuple[list[_Drawn], int]:
    """Draw rows from all sources together: by their weights, or each row alike.

    Returns:
        The rows in random order, and the number of rows that the sources have.
    """
    weights = [source.weight for source in given if source.weight is not None]
    pools = [_reservoir(number, source, split, data, count, rng) for number, source in enumerate(given)]
    whole = sum(size for _, size in pools)
    if weights:
        shares = apportion(min(count, whole), weights)
        drawn = [row for (pool, _), share in zip(pools, shares, strict=True) for row in pool[:share]]
        more = [row for (pool, _), share in zip(pools, shares, strict=True) for row in pool[share:]]
        drawn += more[: count - len(drawn)]  # a source may have fewer rows than its share, which training repeats
    else:  # a pool is a random part of its source, so that drawing from the larger ones more often is drawing rows
        sizes = [size for _, size in pools]
        taken = rng.sample(range(len(pools)), min(count, whole), counts=sizes) if whole else []
        drawn = [row for number, (pool, _) in enumerate(pools) for row in pool[: taken.count(number)]]
    rng.shuffle(drawn)
    return drawn, whole


def _reservoir(
    number: int, source: Source, split: str, data: DataConfig, count: int, rng: random.Random
) -> tuple[list[_Drawn], int]:
    """Draw rows of one source, in random order, in one reading (Vitter 1985, algorithm R).

    Returns:
        The rows, and the number of rows that can be used.

    Raises:
        InputError: More rows than `data.max_refused_share` cannot be used; a line for each of the first of them.
    """
    columns = Columns(
        prompt=source.prompt_column or data.prompt_column,
        completion=source.completion_column or data.completion_column,
        messages=source.messages_column or data.messages_column,
    )
    kept: list[_Drawn] = []
    read = 0
    refused: list[str] = []
    rows = _with_rows(source, split, columns)
    for file, fields, row in bar(f"read {source.path}", "row", iterable=rows, delay=2, leave=False):
        if isinstance(fields, InputError) or isinstance(row, Refused):
            refused.append(row.reason if isinstance(row, Refused) else str(fields))
            continue
        read += 1
        drawn = _Drawn(source=number, file=file, place=read, fields=fields, prompt=_prompt(row))
        if len(kept) < count:
            kept.append(drawn)
        elif (place := rng.randrange(read)) < count:
            kept[place] = drawn
    if len(refused) > data.max_refused_share * (read + len(refused)):
        more = [f"and {len(refused) - MOST_REASONS} more rows"] if len(refused) > MOST_REASONS else []
        raise InputError("\n".join([*refused[:MOST_REASONS], *more]))
    rng.shuffle(kept)
    return kept, read


def _with_rows(source: Source, split: str, columns: Columns) -> Iterator[tuple[int, dict[str, Any] | InputError, Row]]:
    """Yield the number of the file, the fields, and the row that they make, of every row of a source."""
    read: list[dict[str, Any] | InputError] = []

    def remembered(rows: Iterable[RawRow]) -> Iterator[RawRow]:
        for where, fields in rows:
            read[:] = [fields]
            yield where, fields

    for number, (name, rows) in enumerate(raw_files(source, split)):
        for row in validated(name, remembered(rows), columns):
            yield number, read[0], row


def _prompt(row: TextPair | Conversation) -> str:
    if isinstance(row, TextPair):
        return row.prompt
    last = max((i for i, message in enumerate(row.messages) if message["role"] == "assistant"), default=0)
    return json.dumps(row.messages[:last], default=str, sort_keys=True)


def _split(drawn: list[_Drawn], held_out: int) -> tuple[list[_Drawn], list[_Drawn]]:
    """Take rows to hold out, so that rows with the same prompt are on one side.

    Returns:
        The held-out rows, and the rows whose prompts none of them has.

    Raises:
        InputError: So many rows share their prompts that too few are left.
    """
    by_prompt: dict[str, list[_Drawn]] = {}
    for row in drawn:
        by_prompt.setdefault(row.prompt, []).append(row)
    groups = list(by_prompt.values())
    taken: list[_Drawn] = []
    while len(taken) < held_out:
        taken += groups.pop(0)
    left = [row for group in groups for row in group]
    if len(left) < (len(drawn) - held_out) / 2:
        most = max(map(len, by_prompt.values()))
        raise InputError(
            f"data.train: {held_out} rows cannot be held out: there are {len(by_prompt)} prompts, one of them in "
            f"{most} of {len(drawn)} rows, and a prompt has to stay on one side; give data.eval"
        )
    return taken[:held_out], left


def _write(folder: Path, name: str, rows: list[_Drawn]) -> None:
    """Write rows, a folder per source."""
    lines: dict[Path, list[str]] = {}
    for row in rows:
        path = folder / f"{name}-{row.source}" / f"{row.file:05}.jsonl"
        lines.setdefault(path, []).append(json.dumps(row.fields, default=str))
    for path, of_file in lines.items():
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "\n".join(of_file) + "\n")


def _files(folder: Path, name: str, given: list[Source], weighted: bool = True) -> list[Source]:
    """Return the folders of rows as sources that are read as the sources that they were drawn from."""
    found = []
    for number, source in enumerate(given):
        path = folder / f"{name}-{number}"
        if path.exists():
            kept = replace(source, path=str(path), subset=None, split=None, streaming=False)
            found.append(kept if weighted else replace(kept, weight=None))
    return found
