"""Memory and time of a large data set: generate rows, tokenise them, shuffle, and start in the middle.

    python benchmarks/data_size.py --rows 10000000

Each stage runs in a process of its own and reports the most memory that it had that is not backed by files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STEPS = 200


@contextmanager
def measured(what: str, rows: int | None = None) -> Iterator[None]:
    """Print seconds and the peak of anonymous resident memory (mapped files are the page cache's to drop)."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))

    watcher = threading.Thread(target=watch, daemon=True)  # an error ends the program
    watcher.start()
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    rate = f", {rows / seconds:,.0f} rows/s" if rows else ""
    print(f"{what:44} {seconds:9.2f} s{rate}, peak {peak / 1024:,.0f} MiB", flush=True)


def generate(path: Path, rows: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(json.dumps({"prompt": f"What is {i} plus {i % 977}? ", "completion": str(i + i % 977)}) + "\n")


def tokenise(path: Path, rows: int) -> None:
    from selfgen_ds.data.samples import Format, load
    from selfgen_ds.data.tokenizer import byte_tokenizer

    with measured("tokenise", rows):
        load(str(path), "train", byte_tokenizer(), Format(max_length=64))


def train(path: Path, rows: int, **settings: Any) -> None:
    from selfgen_ds.data.batches import StepBatches
    from selfgen_ds.data.packing import load_packs
    from selfgen_ds.data.samples import Format, load
    from selfgen_ds.data.tokenizer import byte_tokenizer

    name = next(iter(settings), "shuffled")
    with measured(f"{name}: open"):
        samples = load(str(path), "train", byte_tokenizer(), Format(max_length=64))
        packs = [load_packs(samples[0], 1024)] if settings.pop("packing", False) else None
        windows = StepBatches(
            samples,
            packs=packs,
            seed=0,
            step_size=32,
            micro_batch_size=16,
            rank=0,
            world_size=2,
            epochs=1,
            **settings,
        )
    middle = windows.steps() // 2
    with measured(f"{name}: first window in the middle, step {middle}"):
        windows.window(middle)
    with measured(f"{name}: {_STEPS} more windows"):
        for step in range(middle + 1, middle + 1 + _STEPS):
            windows.window(step)


def apart(function: Callable[..., None], *arguments: Any, **settings: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments, kwargs=settings)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        path = Path(folder) / "rows.jsonl"
        generate(path, rows)
        print(f"{rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB of JSONL")
        apart(tokenise, path, rows)
        apart(train, path, rows)
        apart(train, path, rows, group_by_length=True)
        apart(train, path, rows, packing=True)


if __name__ == "__main__":
    main()
