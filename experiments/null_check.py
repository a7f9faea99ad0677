"""Check `selfgen-ds compare` and `pilot`: how often they find a difference where there is none, and a known one.

    python experiments/null_check.py --output_dir runs/null

Trains sft on `builtin:pointer_chase` with many seeds, in one process each, evaluates all runs, and compares groups of
a few seeds with each other, 20 times. Of the uncorrected differences about one in twenty may be called significant; a
report may give a metric a word (corrected for the number of metrics) in one of twenty comparisons. So may the verdicts
of a pilot, for which the runs of two groups are taken to be pairs of seeds. The known difference is that of five runs
with half of the steps. Runs that are finished are not repeated. Writes `null.json`, and
prints the counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from selfgen_ds.comparison.runs import Group, grouped, load_run
from selfgen_ds.comparison.verdicts import compared, tested
from selfgen_ds.pilot.verdicts import chosen_metrics, verdicts

_KNOWN = 5  # runs on each side of the known difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/null")
    parser.add_argument("--runs", type=int, default=40, help="number of seeds")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--comparisons", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2, help="number of runs in a group")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of runs at the same time")
    options = parser.parse_args()
    folders = [Path(options.output_dir) / f"sft-{seed}" for seed in range(options.runs)]
    shorter = [Path(options.output_dir) / f"half-{seed}" for seed in range(_KNOWN)]
    runs = [(folder, seed, options.steps) for seed, folder in enumerate(folders)]
    runs += [(folder, seed, options.steps // 2) for seed, folder in enumerate(shorter)]
    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(lambda run: run_seed(*run), runs):
            pass
    found = [count(*pair) for pair in pairs(folders, options.comparisons, options.seeds)]
    in_all, uncorrected = (sum(one[name] for one in found) for name in ("tested", "uncorrected"))
    with_word = sum(one["corrected"] > 0 for one in found)
    with_verdict = sum(one["verdicts"] > 0 for one in found)
    known = count(folders[:_KNOWN], shorter)
    result = {
        "comparisons": found,
        "tested": in_all,
        "uncorrected": uncorrected,
        "with_word": with_word,
        "with_verdict": with_verdict,
        "known": known,
    }
    (Path(options.output_dir) / "null.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"{uncorrected} of {in_all} differences have p below 5 % before the correction ({uncorrected / in_all:.1%})")
    print(f"{with_word} of {len(found)} comparisons find a difference in some metric")
    print(f"{with_verdict} of {len(found)} pilots have a verdict")
    print(f"half of the steps: {known['corrected']} of {known['tested']} differences are found, ", end="")
    print(f"and {known['verdicts']} verdicts of a pilot")


def run_seed(folder: Path, seed: int, steps: int) -> None:
    """Train and evaluate one run, unless it is there."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def call(*arguments: str) -> None:
        command = [sys.executable, "-m", "selfgen_ds", *arguments]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    if not (folder / "model").exists():
        shape = ("--train.micro_batch_size", "32", "--train.max_steps", str(steps), "--eval.every", str(steps))
        task = ("--data.train", "builtin:pointer_chase", "--data.eval", "builtin:pointer_chase")
        recipe = ("--config", "recipes/demo.yaml", *task, "--selfgen.method", "sft", "--seed", str(seed))
        call("train", *recipe, *shape, "--resume", "auto", "--output_dir", str(folder))
    if not (folder / "evaluation.json").exists():
        data = ("--data", "builtin:pointer_chase", "--max_samples", "200", "--sample_temperatures", "[1]")
        call("evaluate", "--model", str(folder / "model"), *data, "--output_dir", str(folder))


def pairs(folders: list[Path], number: int, size: int) -> list[tuple[list[Path], list[Path]]]:
    """Return random pairs of groups of runs; every run is in one pair before any is in another."""
    shuffled: list[Path] = []
    rng = random.Random(0)
    while len(shuffled) < 2 * size * number:
        shuffled += rng.sample(folders, len(folders) - len(folders) % (2 * size))
    starts = range(0, 2 * size * number, 2 * size)
    return [(shuffled[i : i + size], shuffled[i + size : i + 2 * size]) for i in starts]


def count(*folders: list[Path]) -> dict[str, int]:
    """Compare the runs of two groups, and count the differences that are found."""
    groups: list[Group] = []
    for of_group in folders:
        (group,) = grouped([load_run(folder) for folder in of_group])
        groups.append(replace(group, name=str(of_group[0])))
    paired = [replace(group, seeds=list(range(len(group.runs)))) for group in groups]
    of_pilot = verdicts(paired, chosen_metrics(paired))
    metrics = [name for name in groups[0].metrics if name in groups[1].metrics]
    rows = tested(compared(groups, metrics))
    return {
        "tested": len(rows),
        "uncorrected": sum(row["p"] < 0.05 for row in rows),
        "corrected": sum(row["p_corrected"] < 0.05 for row in rows),
        "verdicts": sum(row["verdict"] != "no difference shown" for row in of_pilot),
    }


if __name__ == "__main__":
    main()
