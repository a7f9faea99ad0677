"""Break many runs at random points: `python -m tests.soak --count 100 --output FILE` (`make soak`)."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfgen_ds.files import write_atomically
from selfgen_ds.scaling.environment import commit
from selfgen_ds.versions import versions
from tests.distributed import runs
from tests.faults import METHODS, break_and_resume, random_point, whole
from tests.points import Point


def soak(number: int, seed: int, output: Path) -> int:
    """Break `number` runs at random points, and resume each. Return how many broke a promise.

    Every run is written to `output` as soon as it is done.
    """
    failures, trials = 0, list[dict[str, Any]]()
    made_with = {"commit": commit(), "cores": os.cpu_count()} | versions()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    runs.write_rows(folder)
    unbroken = {method: whole(folder, method) for method in METHODS}
    for trial in itertools.count():
        if sum(result.get("reached", True) for result in trials) == number:
            break
        choice = random.Random(f"{seed}-{trial}")
        method = choice.choice(list(METHODS))
        rank, point = random_point(unbroken[method], choice)
        result: dict[str, Any] = {"trial": trial, "method": method, "rank": rank} | _description(point)
        started, here = time.monotonic(), folder / f"trial-{trial}"
        try:
            result |= {"holds": True} | asdict(break_and_resume(unbroken[method], here, rank, point))
            shutil.rmtree(here)
        except Exception:
            failures += 1
            result |= {"holds": False, "error": traceback.format_exc()}
        result["seconds"] = round(time.monotonic() - started, 1)
        trials.append(result)
        print(json.dumps(result), flush=True)
        report = {"made_with": made_with, "seed": seed, "failures": failures, "trials": trials}
        write_atomically(output, json.dumps(report, indent=1) + "\n")
    print(f"{number} runs were broken; {failures} of them broke a promise", flush=True)
    return failures


def _description(point: Point) -> dict[str, Any]:
    return {name: value for name, value in asdict(point).items() if name not in ("signal", "inside")}


def _main() -> None:
    parser = argparse.ArgumentParser(description=soak.__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    sys.exit(soak(options.count, options.seed, options.output) > 0)


if __name__ == "__main__":
    _main()
