"""What a comparison keeps of the rows of an evaluated run: numbers in columns, and no texts but some examples."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfgen_ds.evaluation import predictions
from selfgen_ds.evaluation.curves import Curves
from selfgen_ds.evaluation.metrics import SampleScore

_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """The rows of a run's `predictions.jsonl`."""

    sample_ids: np.ndarray
    """`[rows]` int64."""
    prompts: np.ndarray
    """`[rows]` int64, a number for each prompt; rows whose answer follows on nothing have one each."""
    references: str
    """Checksum of the references' texts."""
    statistics: dict[str, np.ndarray]
    """Metric -> `[rows, numbers]` float64; a row that does not count the metric has zeros."""
    curves: Curves
    examples: list[SampleScore]
    """The first rows."""

    def __len__(self) -> int:
        return len(self.sample_ids)


def read_scores(path: Path) -> RunScores:
    """Read `predictions.jsonl`, one row at a time.

    Raises:
        OSError: The file cannot be read.
        InputError: It is damaged, or of an older version.
        ValueError: Rows have different statistics of a metric.
    """
    ids, prompts, references = array("q"), array("q"), hashlib.sha256()
    known: dict[bytes, int] = {}
    columns, curves = _Columns(), Curves()
    examples: list[SampleScore] = []
    for score in predictions.read(path):
        columns.add(len(ids), score.statistics)
        own = score.prompt or f"row {len(ids)}"
        prompts.append(known.setdefault(hashlib.sha256(own.encode()).digest(), len(known)))
        ids.append(score.sample_id)
        references.update(f"{len(score.reference)} {score.reference}".encode())
        curves.add(score)
        if len(examples) < _EXAMPLES:
            examples.append(score)
    return RunScores(
        sample_ids=np.array(ids, dtype=np.int64),
        prompts=np.array(prompts, dtype=np.int64),
        references=references.hexdigest(),
        statistics=columns.arrays(len(ids)),
        curves=curves,
        examples=examples,
    )


class _Columns:
    """The statistics of rows, a column per metric."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._values: dict[str, array[float]] = {}

    def add(self, row: int, statistics: dict[str, list[float]]) -> None:
        """Add the statistics of a row to the columns, which rows before it may lack."""
        for name, numbers in statistics.items():
            column, size = self._values.setdefault(name, array("d")), self._sizes.setdefault(name, len(numbers))
            if len(numbers) != size:
                raise ValueError(f"row {row}: {name} has {len(numbers)} numbers, and {size} in the rows before")
            column.frombytes(bytes(8 * (size * row - len(column))))
            column.extend(numbers)

    def arrays(self, rows: int) -> dict[str, np.ndarray]:
        """Return each column as `[rows, numbers]`."""
        arrays = {}
        for name, column in self._values.items():
            column.frombytes(bytes(8 * (self._sizes[name] * rows - len(column))))
            arrays[name] = np.frombuffer(column).reshape(rows, self._sizes[name])
        return arrays
