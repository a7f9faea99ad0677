"""Recovery after a forced error on `builtin:pointer_chase`, by method and seed: the table of docs/results.md.

    python experiments/recovery.py --output_dir runs/recovery

For every seed a warm-up of 500 steps with sft, then from its model 1000 steps with each method, in one process on the
CPU; what is finished is not run again. Writes `recovery.md` beside the runs, and what `selfgen-ds compare` writes.
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
METRICS = ("exact_match", "recovery_1", "recovery_4", "recovery_last", "sampled_exact_match")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/recovery")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--warm_up_steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="seeds that run at once")
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
    """A warm-up, then every method from its model."""
    folder = Path(options.output_dir)
    warm_up = folder / f"warm-up-{seed}"
    train(warm_up, seed, options.warm_up_steps, "--selfgen.method", "sft")
    for method in METHODS:
        run = folder / f"{method}-{seed}"
        start = ("--model.name_or_path", str(warm_up / "model"), "--selfgen.method", method)
        train(run, seed, options.steps, *start)
        if not (run / "evaluation.json").exists():
            data = ("--data", "builtin:pointer_chase", "--sample_temperature", "2")
            call("evaluate", "--model", str(run / "model"), *data, "--output_dir", str(run))


def train(folder: Path, seed: int, steps: int, *changes: str) -> None:
    if (folder / "model").exists():
        return
    # 32 rows a step, as the demo's two ranks have
    shape = ("--train.micro_batch_size", "32", "--train.max_steps", str(steps), "--eval.every", str(steps))
    recipe = ("--config", "recipes/demo.yaml", "--seed", str(seed), "--resume", "auto")
    call("train", *recipe, *shape, "--output_dir", str(folder), *changes)


def call(*arguments: str) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "selfgen_ds", *arguments], check=True, env=environment)


def markdown(runs: list[Path]) -> str:
    """A row a run."""
    lines = [f"| run | {' | '.join(METRICS)} |", "|---" * (len(METRICS) + 1) + "|"]
    for run in runs:
        metrics = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["metrics"]
        lines.append(f"| {run.name} | {' | '.join(f'{metrics[name]:.3f}' for name in METRICS)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
