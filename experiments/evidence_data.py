"""The rows of the studies of `evidence.py`: training, development and test rows of a task or of a data set."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from selfgen_ds.data import tasks
from selfgen_ds.files import write_atomically

Pair = tuple[str, str]
_PROBED = 256
"""Training rows by which costs are measured."""


def write_rows(folder: Path, data: str, source: Path, rows: int) -> None:
    """Write `train.jsonl` and `probe.jsonl`, and, of what is no built-in task, `dev.jsonl` and `test.jsonl`.

    Args:
        data: `e2e`, `gsm8k`, or a built-in task.
        source: Folder with the data sets, `e2e/devset.csv` and `gsm8k/train.jsonl`.
        rows: Training rows.
    """
    if (folder / "probe.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    parts = SETS[data](source / data) if data in SETS else {"train": tasks.generate(data, "train")}
    for name, pairs in parts.items():
        chosen = [pair for pair, _ in zip(pairs, range(rows if name == "train" else 10**9), strict=False)]
        _write(folder / f"{name}.jsonl", chosen)
        if name == "train":
            probed = chosen[:_PROBED]
    _write(folder / "probe.jsonl", probed)


def evaluated(data: str, split: str, folder: Path) -> str:
    """Return the rows to evaluate on: a split of a built-in task, or a file."""
    return str(folder / f"{split}.jsonl") if data in SETS else f"builtin:{data}/{split}"


def _e2e(folder: Path) -> dict[str, Iterable[Pair]]:
    """Split E2E by meaning representation: a tenth for tests, a tenth for development, in random order of rows."""
    with open(folder / "devset.csv", encoding="utf-8", newline="") as file:
        pairs = [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
    pairs.sort(key=lambda pair: zlib.crc32(repr(pair).encode()))
    parts: dict[str, list[Pair]] = {"train": [], "dev": [], "test": []}
    for prompt, completion in pairs:
        part = {0: "test", 1: "dev"}.get(zlib.crc32(prompt.encode()) % 10, "train")
        parts[part].append((prompt, completion))
    return {**parts}


def _gsm8k(folder: Path) -> dict[str, Iterable[Pair]]:
    """Take GSM8K's training rows, but the last 200 for development, and its test rows."""
    of_file = {}
    for name in ("train", "test"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        of_file[name] = [(row["question"], row["answer"]) for row in map(json.loads, lines)]
    return {"train": of_file["train"][:-200], "dev": of_file["train"][-200:], "test": of_file["test"]}


SETS = {"e2e": _e2e, "gsm8k": _gsm8k}
"""Data set -> a function from its folder to its parts."""


def _write(path: Path, pairs: list[Pair]) -> None:
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    write_atomically(path, "\n".join(lines) + "\n")
