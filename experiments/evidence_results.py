"""The results of `evidence.py`, `results/STUDY.jsonl`: a line per run, which a second run of the same name replaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.evidence_metrics import TITLES
from selfgen_ds.comparison.costs import cost_of
from selfgen_ds.files import write_atomically
from selfgen_ds.pilot.runs import StudyRun

RESULTS = Path(__file__).parent / "results"


def path_of(study: str) -> Path:
    """Return the file with the results of a study."""
    return RESULTS / f"{study}.jsonl"


def read(study: str, part: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of a study, or of one part of it, as `write` writes them; none if it has not begun."""
    path = path_of(study)
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [line for line in lines if part in (None, line["part"])]


def write(run: StudyRun, settings: dict[str, Any], study: str, part: str) -> None:
    """Add a run to the results of its study, or replace its line."""
    evaluation = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
    cost = cost_of(run.folder / "metrics.jsonl")
    assert cost is not None
    line: dict[str, Any] = {"part": part, "arm": run.arm.name, "seed": run.seed}
    line |= {"steps": round(cost.steps), "flops": cost.flops}
    line["metrics"] = {name: round(v, 5) for name, v in evaluation["metrics"].items() if name in TITLES}
    if (differing := _differing_share(run.folder / "metrics.jsonl")) is not None:
        line["metrics"]["differing_share"] = round(differing, 5)
    if part == "curves":
        line["curve"] = _curve(run.folder / "metrics.jsonl")
    line["settings"] = settings

    def name(entry: dict[str, Any]) -> tuple[str, str, int]:
        return entry["part"], entry["arm"], entry["seed"]

    lines = {name(entry): entry for entry in [*read(study), line]}
    RESULTS.mkdir(exist_ok=True)
    ordered = sorted(lines.values(), key=name)
    write_atomically(path_of(study), "".join(json.dumps(entry) + "\n" for entry in ordered))


def _differing_share(path: Path) -> float | None:
    """Return the share of the tokens that the run drew into its contexts that differ from the reference."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    drawn = sum(line["drawn_tokens"] for line in lines)
    return sum(line["drawn_tokens"] * line["differing_share"] for line in lines) / drawn if drawn else None


def _curve(path: Path) -> list[dict[str, float]]:
    """Return the evaluations of a run, each with the steps and operations until then."""
    curve, flops = [], 0.0
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        flops += line["flops"]
        if evaluated := {name[5:]: round(v, 5) for name, v in line.items() if name.startswith("eval_")}:
            kept = {name: v for name, v in evaluated.items() if name in TITLES}
            curve.append({"step": line["step"], "flops": flops, **kept})
    return curve
