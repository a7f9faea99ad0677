"""The results of `evidence.py`: a line per run, and the arms of a task compared with sft and with the control."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.evidence_metrics import TESTED, TITLES
from selfgen_ds.comparison.costs import cost_of
from selfgen_ds.comparison.runs import Group, grouped, load_run
from selfgen_ds.comparison.verdicts import compared
from selfgen_ds.files import as_json, write_atomically
from selfgen_ds.pilot.runs import StudyRun

RESULTS = Path(__file__).parent / "results"


def write_run(run: StudyRun, study: str, part: str) -> None:
    """Add a run to the results of its study, or replace its line."""
    evaluation = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
    cost = cost_of(run.folder / "metrics.jsonl")
    assert cost is not None
    line: dict[str, Any] = {
        "part": part,
        "arm": run.arm.name,
        "seed": run.seed,
        "steps": cost.steps,
        "flops": cost.flops,
    }
    line["metrics"] = {name: round(v, 5) for name, v in evaluation["metrics"].items() if name in TITLES}
    if (differing := _differing_share(run.folder / "metrics.jsonl")) is not None:
        line["metrics"]["differing_share"] = round(differing, 5)
    if part == "curves":
        line["curve"] = _curve(run.folder / "metrics.jsonl")
    path = RESULTS / f"{study}.jsonl"
    path.parent.mkdir(exist_ok=True)
    old = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def name(entry: dict[str, Any]) -> tuple[str, str, int]:
        return entry["part"], entry["arm"], entry["seed"]

    lines = {name(entry): entry for entry in [*old, line]}
    ordered = sorted(lines.values(), key=name)
    write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in ordered))


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


def write_comparison(runs: list[StudyRun], study: str, part: str, control: str = "noise") -> list[dict[str, Any]]:
    """Compare all arms with sft, and with the control, and write the differences.

    Returns:
        The rows of `compare`; those of the comparison with the control have the baseline `noise`.
    """
    groups: list[Group] = []
    for name in dict.fromkeys(run.arm.name for run in runs):
        (group,) = grouped([load_run(run.folder) for run in runs if run.arm.name == name])
        groups.append(replace(group, method=name))
    metrics = [name for name in TESTED if name in groups[0].metrics]
    rows = [{"baseline": groups[0].method, **row} for row in compared(groups, metrics)]
    if of_control := [group for group in groups if group.method == control]:
        others = [group for group in groups if group.method not in (control, groups[0].method)]
        rows += [
            {"baseline": control, **row}
            for row in compared([*of_control, *others], metrics)
            if row["paired_difference"] is not None
        ]
    kept = (
        "baseline",
        "method",
        "metric",
        "mean",
        "low",
        "high",
        "paired_difference",
        "paired_low",
        "paired_high",
        "p",
    )
    short = [{name: _rounded(row[name]) for name in (*kept, "p_corrected", "verdict")} for row in rows]
    write_atomically(RESULTS / f"{study}-{part}.json", as_json(short))
    return rows


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value
