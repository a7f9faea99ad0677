"""Checks that a run can train on a complete round, and that a method's rows fit the samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfgen_ds.data.row import ARRAYS, TrainingRow
from selfgen_ds.errors import InputError
from selfgen_ds.methods.method import RoundMethod
from selfgen_ds.ranks import process_group
from selfgen_ds.rounds.store import StoredRows, broken_files, load_table, read_audit

log = logging.getLogger("selfgen_ds")


def check_round(
    setting: str, folder: Path, fingerprint: dict[str, str], settings: dict[str, Any], max_length: int
) -> None:
    """Refuse a complete round that the run cannot train on, and warn if other settings drew the round.

    Args:
        setting: Name of the setting that errors blame.
        fingerprint: Checksums of the sources of the run's contexts: `model`, `tokenizer`, and `data`.
        settings: The method's name and the settings that the method reads.
        max_length: Most tokens of a row.

    Raises:
        InputError: The round was drawn from another source, is damaged, or has rows that are too long.
    """
    audit = read_audit(folder)
    if audit.get("method") != settings["method"]:
        by = f"by {audit.get('method')}, not by {settings['method']}"
        raise InputError(f"{setting}: {folder} was drawn {by}")
    for part, expected in fingerprint.items():
        if (drawn_from := audit["fingerprint"].get(part)) != expected:
            name = {"model": "starting model"}.get(part, part)
            raise InputError(
                f"{setting}: {folder} was drawn from another {name}: expected {expected}, got {drawn_from}"
            )
    if process_group.rank() != 0:  # reading all files once is enough
        return
    if broken := broken_files(folder):
        raise InputError(
            f"{setting}: {folder} is broken ({', '.join(broken)}); mend it, or move it away to draw the round again"
        )
    differing = [
        f"{name} was {value!r} and is now {settings.get(name)!r}"
        for name, value in audit.get("settings", {}).items()
        if settings.get(name) != value
    ]
    if differing:
        log.warning("%s was drawn with other settings: %s", folder, ", ".join(differing))
    table = load_table(folder)
    numbers = np.arange(len(table))
    if (longest := StoredRows(table, numbers).lengths(numbers).max(initial=0)) > max_length:
        raise InputError(f"{setting}: {folder} has rows of {longest} tokens, more than data.max_length={max_length}")


def rows_problem(method: RoundMethod, samples: Sequence[TrainingRow], rows: Sequence[TrainingRow]) -> str | None:
    """Describe how a method's rows do not fit the samples that they replace; None if they fit."""
    for row in rows:
        if len({len(getattr(row, name)) for name in ARRAYS}) > 1:
            return f"sample {row.sample_id} has arrays of several lengths"
        if len(row) > (most := method.plan.max_length):
            return f"sample {row.sample_id} has {len(row)} tokens, more than data.max_length={most}"
    ids, row_ids = [sample.sample_id for sample in samples], [row.sample_id for row in rows]
    if method.keeps_rows:
        if row_ids != ids:
            return (
                f"expected one row for each of samples {ids[:5]} ... ({len(ids)} in all), got rows for samples "
                f"{row_ids[:5]} ... ({len(row_ids)} in all)"
            )
        for sample, row in zip(samples, rows, strict=True):
            if len(row) != len(sample):
                return (
                    f"sample {row.sample_id} has become longer or shorter, although the method has `keeps_rows = True`"
                )
    elif row_ids != sorted(row_ids) or not set(row_ids) <= set(ids):
        return f"expected rows of samples {ids[:5]} ..., in their order, got rows of samples {row_ids[:5]} ..."
    return None
