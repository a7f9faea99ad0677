"""Check that a refactor changes nothing that a run computes: `python -m tests.same_bits --base REVISION`.

Each recipe that runs on two CPU ranks is shortened and run twice, from a checkout of REVISION and from this tree. The
losses and all other untimed metrics, the rows of every round, the exported weights and the scores of `evaluate` must
be the same bytes. The script prints one line per run and exits with code 1 if any of them differs. What REVISION gave
is kept in `runs/same_bits/`, so that a second call runs this tree alone.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from tests.distributed.runs import TIMED
from tests.ranks import ENVIRONMENT, ROOT, SHARED, free_port

_SHORT = ["--checkpoint.every", "3", "--eval.every", "3", "--eval.max_samples", "16"]
_E2E = ["--data.train", "{data}/train.csv", "--data.eval", "{data}/dev.csv", *_SHORT]
RUNS: dict[str, tuple[str, list[str]]] = {
    "demo, sft": ("demo", ["--selfgen.method", "sft", "--train.max_steps", "6", *_SHORT]),
    "demo, scheduled_sampling": ("demo", ["--train.max_steps", "6", *_SHORT]),
    "demo, two exact passes at most, packed": (
        "demo",
        ["--train.max_steps", "4", "--selfgen.passes", "exact", "--data.packing", "true", *_SHORT],
    ),
    "demo, mixture of experts": (
        "demo",
        [
            *("--train.max_steps", "4", "--selfgen.drawn_context_weight", "0.5", "--optim.label_smoothing", "0.1"),
            *("--model.preset", json.dumps({"model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48})),
            *_SHORT,
        ],
    ),
    "gsm8k": ("gsm8k", ["--data.train", "{data}/gsm8k.jsonl", "--train.epochs", "1"]),
    "e2e-sft": ("e2e-sft", [*_E2E, "--train.max_steps", "6"]),
    "e2e-scheduled_sampling": ("e2e-scheduled_sampling", [*_E2E, "--train.max_steps", "6"]),
    "e2e-bash": ("e2e-bash", [*_E2E, "--train.epochs", "2"]),
    "e2e-rac": ("e2e-rac", [*_E2E, "--train.epochs", "2", "--selfgen.max_new_tokens", "48"]),
}
"""Name of a run -> its recipe, and the options that make the run short."""


def write_data(folder: Path) -> None:
    """Write the first rows of GSM8K and E2E to `folder`."""
    with open(SHARED / "data/gsm8k/train.jsonl", encoding="utf-8") as rows:
        (folder / "gsm8k.jsonl").write_text("".join(islice(rows, 64)), encoding="utf-8")
    with open(SHARED / "data/e2e/devset.csv", encoding="utf-8", newline="") as file:
        header, *rows_of_text = islice(csv.reader(file), 1 + 96 + 16)
    for name, part in {"train": rows_of_text[:96], "dev": rows_of_text[96:]}.items():
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *part])


def run(name: str, tree: Path, folder: Path, data: Path) -> dict[str, Any]:
    """Train and evaluate one run with the code of `tree`, and return everything that must be equal."""
    recipe, options = RUNS[name]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    train = [*launcher, "--master_port", str(free_port()), "--module", "selfgen_ds", "train"]
    train += ["--config", f"recipes/{recipe}.yaml", "--output_dir", str(folder)]
    evaluate = [sys.executable, "-m", "selfgen_ds", "evaluate", "--model", str(folder / "model")]
    evaluate += ["--max_samples", "8", "--output_dir", str(folder / "evaluation"), "--sample_temperatures", "[1]"]
    if recipe == "demo":
        evaluate += ["--data", "builtin:sort"]
    elif recipe == "gsm8k":
        evaluate += [
            "--data",
            f"{data}/gsm8k.jsonl",
            "--prompt_column",
            "question",
            "--completion_column",
            "answer",
        ]
    else:
        evaluate += ["--data", f"{data}/dev.csv", "--prompt_column", "mr", "--completion_column", "ref"]
    environment = os.environ | ENVIRONMENT | {"HF_DATASETS_CACHE": str(folder.parent / "cache")}
    for command in ([*train, *(option.replace("{data}", str(data)) for option in options)], evaluate):
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"{name} failed in {tree}:\n{(done.stdout + done.stderr)[-3000:]}")
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        metrics = [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in file]
    rounds = {path.name: datasets.load_from_disk(str(path)) for path in sorted((folder / "rollouts").glob("round-*"))}
    columns = ("sample_id", "context_ids", "target_ids", "loss_mask", "replaced_mask", "answer_equal")
    return {
        "metrics": metrics,
        "rounds": {number: {column: rows[column][:] for column in columns} for number, rows in rounds.items()},
        "model": hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "evaluation": json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["metrics"],
    }


def baseline(revision: str, names: list[str], data: Path) -> dict[str, dict[str, Any]]:
    """Return the results of `revision`: those that an earlier call kept, and the others from a checkout of it."""
    commit = subprocess.check_output(["git", "rev-parse", revision], cwd=ROOT, text=True).strip()
    kept = ROOT / "runs" / "same_bits" / f"{commit}.json"
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if missing := [name for name in names if name not in results]:
        kept.parent.mkdir(parents=True, exist_ok=True)
        tree = data / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=ROOT, check=True)
        try:
            for number, name in enumerate(missing):
                results[name] = run(name, tree, data / f"before-{number}", data)
                kept.write_text(json.dumps(results), encoding="utf-8")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="git revision to compare this tree with")
    parser.add_argument("--only", default="", help="run only the runs whose name contains this text")
    options = parser.parse_args()
    names = [name for name in RUNS if options.only in name]
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_data(data)
        before = baseline(options.base, names, data)
        for number, name in enumerate(names):
            after = run(name, ROOT, data / f"after-{number}", data)
            unequal = [part for part in after if before[name][part] != after[part]]
            differing += bool(unequal)
            verdict = f"DIFFERENT: {', '.join(unequal)}" if unequal else "the same bits"
            print(f"{name}: {len(after['metrics'])} steps, {len(after['rounds'])} rounds: {verdict}", flush=True)
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
