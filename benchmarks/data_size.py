"""Memory and time of a large data set: generate rows, tokenize and shuffle them, and start in the middle.

    python benchmarks/data_size.py --rows 10000000

Each stage runs in a process of its own and reports its peak of memory that is not backed by files.
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
def measured(stage: str, rows: int | None = None) -> Iterator[None]:
    """Print the seconds and the peak of anonymous resident memory of a stage.

    Mapped files do not count, because the kernel may drop their pages.
    """
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))

    watcher = threading.Thread(target=watch, daemon=True)  # so that an error ends the program
    watcher.start()
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    rate = f", {rows / seconds:,.0f} rows/s" if rows else ""
    print(f"{stage:44} {seconds:9.2f} s{rate}, peak {peak / 1024:,.0f} MiB", flush=True)


def generate(path: Path, rows: int) -> None:
    """Write rows of about 40 bytes."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(json.dumps({"prompt": f"What is {i} plus {i % 977}? ", "completion": str(i + i % 977)}) + "\n")


def tokenize(path: Path, rows: int) -> None:
    """Measure the first reading of the rows, which fills the cache."""
    from selfgen_ds.data.encoding import Format
    from selfgen_ds.data.samples import load
    from selfgen_ds.data.tokenizer import byte_tokenizer

    with measured("tokenize", rows):
        load(str(path), "train", byte_tokenizer(), Format(max_length=64))


def train(path: Path, rows: int, **settings: Any) -> None:
    """Measure reading the cache and making batches from the middle of an epoch on.

    Args:
        settings: Of `StepBatches`, or `packing`.
    """
    from selfgen_ds.data.batches import StepBatches
    from selfgen_ds.data.encoding import Format
    from selfgen_ds.data.packing import load_packs
    from selfgen_ds.data.samples import load
    from selfgen_ds.data.tokenizer import byte_tokenizer

    name = next(iter(settings), "shuffled")
    with measured(f"{name}: open"):
        samples = load(str(path), "train", byte_tokenizer(), Format(max_length=64))
        packs = [load_packs(samples[0], 1024)] if settings.pop("packing", False) else None
        step_batches = StepBatches(
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
    middle = step_batches.steps() // 2
    with measured(f"{name}: first batches in the middle, step {middle}"):
        step_batches.at(middle)
    with measured(f"{name}: batches of {_STEPS} more steps"):
        for step in range(middle + 1, middle + 1 + _STEPS):
            step_batches.at(step)


def in_new_process(function: Callable[..., None], *arguments: Any, **settings: Any) -> None:
    """Call a function in a process that has no memory of earlier stages."""
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
        in_new_process(tokenize, path, rows)
        in_new_process(train, path, rows)
        in_new_process(train, path, rows, group_by_length=True)
        in_new_process(train, path, rows, packing=True)


if __name__ == "__main__":
    main()
