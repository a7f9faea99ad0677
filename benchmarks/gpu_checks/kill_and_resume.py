"""A run that is killed resumes from its last complete checkpoint, ends, and leaves a model that transformers loads."""

from __future__ import annotations

import json
import math
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gpu_checks.commands import expect_success, output_of, start
from gpu_checks.recipes import small_recipe
from gpu_checks.rows import Report
from selfgen_ds.checkpoint.manifest import complete_checkpoints
from selfgen_ds.config import to_yaml


def check(report: Report) -> None:
    """Kill a run a few steps past a checkpoint, resume it, and compare the steps that both have made."""
    folder = report.folder
    recipe = small_recipe(report)
    (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    options = ["train", "--config", str(folder / "recipe.yaml"), "--resume", "auto"]
    killed, log, run = folder / "killed.log", folder / "resumed.log", Path(recipe.output_dir)
    process = start(killed, *options)
    _wait_for_steps_past_a_checkpoint(process, killed, run)
    process.kill()
    process.wait()
    before = _losses(run)
    unfinished = len(before) < report.sizes.steps
    report.result("steps until it was killed", f"fewer than {report.sizes.steps}", str(len(before)), unfinished)
    expect_success(start(log, *options), log)
    report.result("resumed", "from a checkpoint", _resumed_from(log), "resumed from" in output_of(log))
    _compare(report, before, _losses(run))
    _load(report, run)


def _wait_for_steps_past_a_checkpoint(process: subprocess.Popen[bytes], log: Path, run: Path) -> None:
    while True:
        complete = complete_checkpoints(run / "checkpoints")
        if complete and len(_losses(run)) >= complete[-1].step + 2:
            return
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before it was killed: {output_of(log)[-3000:]}")
        time.sleep(0.01)


def _losses(run: Path) -> dict[int, float]:
    """Return the loss of every step that is in `metrics.jsonl`; a killed run may leave its last line unfinished."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows}


def _resumed_from(log: Path) -> str:
    lines = [line for line in output_of(log).splitlines() if "resumed from" in line]
    return lines[0].rsplit("/", 1)[-1] if lines else "from the start"


def _compare(report: Report, before: dict[int, float], after: dict[int, float]) -> None:
    steps = report.sizes.steps
    whole = list(after) == list(range(1, steps + 1)) and all(map(math.isfinite, after.values()))
    report.result("steps in metrics.jsonl, all with a finite loss", f"1 to {steps}", f"{len(after)} lines", whole)
    apart = max(abs(after[step] - loss) / loss for step, loss in before.items())
    # On the CPU in float32 the bits are the same. On a GPU, a sum in another order may even change a drawn token.
    most = 0.0 if report.device == "cpu" else 5e-2
    measured = f"{apart:.1e} over {len(before)} steps"
    report.result(
        "largest difference of a step's loss to the killed run's", f"at most {most:g}", measured, apart <= most
    )


def _load(report: Report, run: Path) -> None:
    """Compare the model that the run exported with what `export` makes of the last checkpoint, and load it."""
    log, exported = report.folder / "export.log", report.folder / "exported"
    last = complete_checkpoints(run / "checkpoints")[-1].path
    expect_success(start(log, "export", "--checkpoint", str(last), "--output_dir", str(exported)), log)
    ours, theirs = (load_file(path / "model.safetensors") for path in (run / "model", exported))
    same = ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    report.result("`export` of the last checkpoint writes the run's model", "equal", str(same), same)
    model = AutoModelForCausalLM.from_pretrained(run / "model").to(report.device)
    with torch.no_grad():
        logits = model(torch.tensor([[65, 66, 67]], device=report.device)).logits
    finite = bool(torch.isfinite(logits).all())
    report.result("transformers loads the model: logits", "finite", "finite" if finite else "not finite", finite)
