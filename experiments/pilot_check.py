"""Check that the verdicts of `selfgen-ds pilot` can be trusted, on tasks of which the truth is known.

    python -m experiments.pilot_check --output_dir runs/pilot_check

For each task, sft warms a model up, and a pilot of three seeds continues from it. Mixing mends slips on `sort`, has
nothing to give on `running_sum`, whose sums can all be read off the operands, and does harm on `random_start`, whose
reference does not follow from the letter that the model draws. What is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from selfgen_ds.files import as_json, write_atomically
from selfgen_ds.pilot.runs import as_options

WARM_UPS = {"sort": 1500, "running_sum": 2000, "random_start": 500}
"""Task -> steps of its warm-up."""
METRICS = ["exact_match", "sampled_1_exact_match", "sampled_2_accuracy", "recovery_4", "loss"]
"""Those that a pilot chooses itself, and the tokens at a temperature at which the model errs."""
RESULTS = Path(__file__).parent / "results" / "pilot_check.json"
_PRESET = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
_COMMON = {
    "config": "experiments/evidence_recipe.yaml",
    "deepspeed": "zero2",
    "train.activation_checkpointing": False,
    "train.micro_batch_size": 32,
    "optim.warmup_ratio": 0.05,
    "checkpoint.every": 1000,
    "data.max_length": 128,
}
_MIXTURE = {"method": "scheduled_sampling", "replace_probability": 0.5, "temperature": 3.0}
METHODS = [_MIXTURE | {"optim.loss": "dft", "optim.dft_share": 0.6}, _MIXTURE]
"""The mixture that won on `sort`, and the same without DFT."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/pilot_check")
    parser.add_argument("--rows", type=int, default=16_384, help="training rows")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of runs at the same time")
    options = parser.parse_args()
    for task, steps in WARM_UPS.items():
        folder = Path(options.output_dir) / task
        rows = {"data.train": f"builtin:{task}", "data.eval": f"builtin:{task}/dev"}
        warm_up = folder / "warm-up"
        if not (warm_up / "model").exists():
            own: dict[str, Any] = {"selfgen.method": "sft", "train.max_steps": steps, "eval.every": steps}
            own |= {"model.preset": _PRESET | {"max_position_embeddings": 128}, "seed": 100, "resume": "auto"}
            call("train", _COMMON | rows | own | {"output_dir": str(warm_up)})
        evaluation = {"sample_temperatures": [1.0, 2.0]}
        own = {"model.name_or_path": str(warm_up / "model"), "rows": options.rows, "held_out": 512}
        own |= {"train.epochs": options.epochs, "methods": METHODS, "metrics": METRICS, "evaluation": evaluation}
        call("pilot", _COMMON | rows | own | {"jobs": options.jobs, "output_dir": str(folder / "pilot")})
    verdicts = {}
    for task in WARM_UPS:
        document = json.loads((Path(options.output_dir) / task / "pilot" / "pilot.json").read_text(encoding="utf-8"))
        verdicts[task] = document["verdicts"]
        for row in document["verdicts"]:
            interval = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            print(f"{task}: {row['method']} {row['verdict']} in {row['metric']}: {interval}")
    write_atomically(RESULTS, as_json(verdicts))


def call(command: str, settings: dict[str, Any]) -> None:
    """Run a command of `selfgen-ds` on the CPU."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-m", "selfgen_ds", command, *as_options(settings)], check=True, env=environment)


if __name__ == "__main__":
    main()
