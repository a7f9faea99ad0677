"""Recovery after a forced error on `builtin:pointer_chase`, by method and seed: the table of docs/results.md.

    python experiments/recovery.py --output_dir runs/recovery

For every seed, sft warms a model up for 500 steps; then each method trains that model for 1000 steps, in one process on
the CPU. Runs that are finished are not repeated. Writes `recovery.md` and the files of `selfgen-ds compare` next to the
runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

METHODS = ("sft", "scheduled_sampling", "bash", "rac")
METRICS = ("exact_match", "recovery_1", "recovery_4", "recovery_last", "sampled_2_exact_match")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/recovery")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--warm_up_steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of seeds that run at the same time")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(lambda seed: run_seed(options, seed), options.seeds):
            pass
    runs = [Path(options.output_dir) / f"{method}-{seed}" for method in METHODS for seed in options.seeds]
    call("compare", *map(str, runs), "--output_dir", options.output_dir)
    table = Path(options.output_dir) / "recovery.md"
    table.write_text(markdown(runs), encoding="utf-8")
    print(table.read_text(encoding="utf-8"))


def run_seed(options: argparse.Namespace, seed: int) -> None:
    """Train and evaluate every method from the warmed-up model of a seed."""
    folder = Path(options.output_dir)
    warm_up = folder / f"warm-up-{seed}"
    train(warm_up, seed, options.warm_up_steps, "--selfgen.method", "sft")
    for method in METHODS:
        run = folder / f"{method}-{seed}"
        start = ("--model.name_or_path", str(warm_up / "model"), "--selfgen.method", method)
        train(run, seed, options.steps, *start)
        if not (run / "evaluation.json").exists():
            data = ("--data", "builtin:pointer_chase", "--sample_temperatures", "[2]")
            call("evaluate", "--model", str(run / "model"), *data, "--output_dir", str(run))


def train(folder: Path, seed: int, steps: int, *changes: str) -> None:
    """Train the demo's recipe with changes, unless the model exists."""
    if (folder / "model").exists():
        return
    # 32 rows per step, as on the demo's two ranks
    shape = ("--train.micro_batch_size", "32", "--train.max_steps", str(steps), "--eval.every", str(steps))
    recipe = ("--config", "recipes/demo.yaml", "--seed", str(seed), "--resume", "auto")
    call("train", *recipe, *shape, "--output_dir", str(folder), *changes)


def call(*arguments: str) -> None:
    """Run `selfgen-ds` in a process of its own, with one thread."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "selfgen_ds", *arguments], check=True, env=environment)


def markdown(runs: list[Path]) -> str:
    """Return the metrics as a Markdown table with a row per run."""
    lines = [f"| run | {' | '.join(METRICS)} |", "|---" * (len(METRICS) + 1) + "|"]
    for run in runs:
        metrics = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["metrics"]
        lines.append(f"| {run.name} | {' | '.join(f'{metrics[name]:.3f}' for name in METRICS)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
