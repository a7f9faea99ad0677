"""`predictions.jsonl`: the scores of every row of an evaluation, one line each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

from selfgen_ds.errors import InputError
from selfgen_ds.evaluation.metrics import SampleScore
from selfgen_ds.files import write_atomically

FILE = "predictions.jsonl"
_FIELDS = {field.name for field in fields(SampleScore)}


def write(path: Path, scores: list[SampleScore]) -> None:
    """Write the scores, each with the values of its metrics, which a reader of the file may want."""
    lines = [json.dumps(asdict(score) | {"metrics": score.metrics()}, ensure_ascii=False) for score in scores]
    write_atomically(path, "\n".join(lines) + "\n")


def checksum(path: Path) -> str:
    """Return a checksum of a file, by which an evaluation knows its rows."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> Iterator[SampleScore]:
    """Yield the scores of a file, one after the other.

    Raises:
        OSError: The file cannot be read.
        InputError: A line is not as `write` writes it.
    """
    with open(path, "rb") as file:  # line ends of Unicode inside a text end no line of bytes
        for number, line in enumerate(file, start=1):
            try:
                scores = json.loads(line)
                yield SampleScore(**{name: scores[name] for name in _FIELDS & scores.keys()})
            except (ValueError, TypeError, AttributeError) as error:
                problem = f"{path}: line {number} is not as this version of evaluate writes it"
                raise InputError(f"{problem}; evaluate the model again") from error
