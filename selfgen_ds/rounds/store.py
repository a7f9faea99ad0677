"""The files of a round: `rollouts/round-01/`, a folder for `datasets.load_from_disk`.

All ranks fill `round-01.partial/` chunk by chunk; the folder is renamed when it is complete. The file with a chunk's
counts is written last, and shows that the chunk is complete. `round.json`, the audit, records the weights and settings
that drew the round.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.arrow_writer import ArrowWriter

from selfgen_ds.data.row import RowReader, TrainingRow
from selfgen_ds.errors import InputError
from selfgen_ds.files import damaged, intact, naming, refusal, sync_and_sum, sync_folder, write_atomically

log = logging.getLogger("selfgen_ds")

AUDIT = "round.json"
_IDS, _MASK = datasets.List(datasets.Value("int32")), datasets.List(datasets.Value("bool"))
_FEATURES = datasets.Features(
    {
        "sample_id": datasets.Value("int64"),
        "context_ids": _IDS,
        "target_ids": _IDS,
        "loss_mask": _MASK,
        "replaced_mask": _MASK,
        "answer_equal": datasets.Value("bool"),
    }
)


class StoredRows:
    """Rows of a round that are trained on instead of the samples of one source.

    Args:
        rows: `[rows]` int64: numbers of the rows in the table.
    """

    def __init__(self, table: datasets.Dataset, rows: np.ndarray) -> None:
        self._reader = RowReader(table)
        self._rows = rows
        self._lengths = pc.list_value_length(table.data.column("context_ids")).to_numpy()[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TrainingRow:
        columns = self._reader[int(self._rows[index])]
        # Nothing of a round's row is replaceable any more.
        return TrainingRow(replaceable_mask=np.zeros(len(columns["context_ids"]), bool), **columns)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Return the tokens of some rows: int64."""
        return self._lengths[indices].astype(np.int64)


def read_audit(folder: Path) -> dict[str, Any]:
    """Return the record of the weights and settings that drew a round.

    Raises:
        InputError: The folder has no such record.
    """
    try:
        audit = json.loads((folder / AUDIT).read_text(encoding="utf-8"))
        audit["fingerprint"]["weights"], audit["replace_probability"]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / AUDIT}: not the record of a round") from error
    except OSError as error:
        raise InputError(refusal(error) or f"{folder / AUDIT}: {error}") from error
    return audit


def broken_files(folder: Path) -> list[str]:
    """Return the files of a complete round that cannot be read or are not as they were written. All files are read.

    Raises:
        InputError: The folder has no record of its files.
    """
    return damaged(folder, read_audit(folder).get("files", {}))


def load_table(folder: Path) -> datasets.Dataset:
    """Return a complete round, memory-mapped.

    Raises:
        InputError: The folder is damaged, or holds something else.
    """
    rows = read_audit(folder).get("counts", {}).get("rows")
    try:
        table = datasets.load_from_disk(str(folder))
        if not isinstance(table, datasets.Dataset) or table.features != _FEATURES:
            raise ValueError(f"expected a data set of {', '.join(_FEATURES)}")
        if len(table) != rows:  # a file that is cut between two batches of rows can be read without an error
            raise ValueError(f"expected {rows} rows, as {AUDIT} says, got {len(table)}")
        return table.with_format("numpy")
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise InputError(f"{folder}: not a complete round: {' '.join(str(error).split())}") from error


class Writer:
    """Writes a round while it is drawn.

    Args:
        folder: The folder of the complete round.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")

    def start(self, audit: dict[str, Any]) -> dict[str, Any]:
        """Begin the round, or continue one that an earlier process began. Only one rank may call this.

        Args:
            audit: Record of the weights and settings that draw the round.

        Returns:
            The audit to continue with. A round that is continued keeps its chunk size, which may differ from that of
            `audit`. Chunks that other weights or settings have drawn are deleted.
        """
        if (self.partial / AUDIT).exists():
            before = read_audit(self.partial)
            if all(before.get(key) == value for key, value in audit.items() if key not in ("chunk_size", "started")):
                return before
            log.warning("%s was begun by other weights or settings; drawing it again", self.partial)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        write_atomically(self.partial / AUDIT, json.dumps(audit, indent=1))
        return audit

    def missing(self, chunks: int) -> list[int]:
        """Return the chunks that are still to be drawn."""
        return [chunk for chunk in range(chunks) if not self._is_written(chunk)]

    def write(self, chunk: int, rows: Sequence[TrainingRow], counts: dict[str, int], seconds: float) -> None:
        """Write one chunk. It is on the disk when this returns.

        Args:
            counts: For the record of the round.
            seconds: The chunk's share of the time in which all ranks drew theirs.
        """
        path = self.partial / _file(chunk)
        with naming(path), ArrowWriter(features=_FEATURES, path=str(path), writer_batch_size=1000) as writer:
            for row in rows:
                writer.write({name: getattr(row, name) for name in _FEATURES})
            writer.finalize()
        drawn = [row.replaced_mask for row in rows]
        differing = [row.replaced_mask & (row.context_ids != row.target_ids) for row in rows]
        summed = {
            "rows": len(rows),
            "drawn_tokens": sum(int(mask.sum()) for mask in drawn),
            "differing_tokens": sum(int(mask.sum()) for mask in differing),
            "rows_with_drawn_tokens": sum(bool(mask.any()) for mask in drawn),
            "equal_answers": sum(row.answer_equal for row in rows),
        }
        record = {"file": sync_and_sum(path), "counts": summed | counts, "seconds": seconds}
        write_atomically(self._counts(chunk), json.dumps(record))

    def finish(self, chunks: int, audit: dict[str, Any]) -> dict[str, Any]:
        """Complete the round when all chunks are written. Only one rank may call this.

        Returns:
            The audit with the counts and seconds of all chunks added up, whichever process drew them, except for
            `passes`, whose largest value counts.
        """
        counts: Counter[str] = Counter()
        passes, seconds = 0, 0.0
        files = {}
        for chunk in range(chunks):
            written = json.loads(self._counts(chunk).read_text(encoding="utf-8"))
            files[_file(chunk)] = written["file"]
            passes = max(passes, written["counts"].pop("passes", 0))
            counts.update(written["counts"])
            seconds += written["seconds"]
        audit = audit | {"passes": passes, "counts": dict(counts), "seconds": round(seconds, 3), "files": files}
        write_atomically(self.partial / AUDIT, json.dumps(audit, indent=1))
        with naming(self.partial):
            datasets.DatasetInfo(features=_FEATURES).write_to_directory(str(self.partial))
        sync_and_sum(self.partial / "dataset_info.json")
        state: dict[str, Any] = {
            "_data_files": [{"filename": _file(chunk)} for chunk in range(chunks)],
            "_fingerprint": hashlib.sha256(json.dumps(audit).encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        write_atomically(self.partial / "state.json", json.dumps(state, indent=1))
        self.partial.rename(self.folder)
        sync_folder(self.folder.parent)
        for chunk in range(chunks):
            (self.folder / self._counts(chunk).name).unlink()
        return audit

    def _is_written(self, chunk: int) -> bool:
        counts = self._counts(chunk)
        return counts.exists() and intact(self.partial / _file(chunk), json.loads(counts.read_bytes())["file"])

    def _counts(self, chunk: int) -> Path:
        return self.partial / _file(chunk).replace(".arrow", ".json")


def _file(chunk: int) -> str:
    return f"rows-{chunk:06d}.arrow"
