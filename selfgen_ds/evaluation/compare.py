"""`selfgen-ds compare`: several evaluated runs -> one table (Markdown, JSON) and one plot.

Runs whose recipes differ in nothing but the seed (and where they start from and write to) are one row.
Intervals are 95 % bootstrap percentiles over seeds and rows; differences to the baseline are paired by row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml

from selfgen_ds.config import CompareOptions
from selfgen_ds.errors import InputError
from selfgen_ds.evaluation.scores import METRICS, RECOVERY_METRICS, SAMPLED_METRICS, corrected
from selfgen_ds.files import make_folder, write_atomically

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Runs that differ in the seed alone."""

    name: str
    method: str
    seeds: list[int]
    sample_ids: list[int]
    scores: dict[str, np.ndarray]
    """Metric -> `[seeds, rows]`."""
    recovery: list[float] | None
    settings: dict[str, Any]


def run(options: CompareOptions) -> None:
    """Compare as the command line says.

    Raises:
        InputError: A run is missing, or the runs were not evaluated on the same rows.
    """
    folder = Path(options.output_dir)
    make_folder(folder, "--output_dir")
    if len({Path(run).resolve() for run in options.runs}) < len(options.runs):
        raise InputError("a run is given twice")
    try:
        groups = _group([_load(Path(run)) for run in options.runs])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{', '.join(options.runs)}: not what train and evaluate write: {error!r}") from error
    baseline = groups[0]
    for group in groups:
        if (group.settings, group.sample_ids) != (baseline.settings, baseline.sample_ids):
            other = [n for n, value in group.settings.items() if value != baseline.settings[n]] or ["rows"]
            different = f"different rows or settings ({', '.join(other)})"
            raise InputError(f"{group.name} and {baseline.name} were evaluated on {different}")
    rng = np.random.default_rng(0)
    # the loss is a mean over tokens, not over rows
    known = [m for m in {**METRICS, **RECOVERY_METRICS, **SAMPLED_METRICS} if m != "loss"]
    for number in range(1, baseline.settings["correction_rounds"] + 1):
        known += corrected(number).values()
    metrics = [m for m in known if all(m in group.scores for group in groups)]
    rows = [_row(group, baseline, metric, rng) for group in groups for metric in metrics]
    write_atomically(folder / "comparison.json", json.dumps({"baseline": baseline.name, "rows": rows}, indent=1))
    table = _markdown(rows, groups, metrics)
    write_atomically(folder / "comparison.md", table)
    _plot(groups, rows, metrics, folder / "comparison.png")
    print(table)
    print(f"written to {folder}/comparison.json, comparison.md and comparison.png")


def _load(folder: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        with open(folder / "predictions.jsonl", encoding="utf-8") as file:
            predictions = [json.loads(line) for line in file]
    except OSError as error:
        raise InputError(f"{error.filename}: missing; a run to compare is trained and evaluated first") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{folder}: {' '.join(str(error).split())}") from error
    if not predictions:
        raise InputError(f"{folder}/predictions.jsonl: no rows")
    return {"folder": folder, "recipe": recipe, "evaluation": evaluation, "predictions": predictions}


def _group(runs: list[dict[str, Any]]) -> list[_Group]:
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for entry in runs:
        recipe = {k: v for k, v in entry["recipe"].items() if k not in ("seed", "output_dir", "resume")}
        recipe["model"] = {k: v for k, v in recipe["model"].items() if k != "name_or_path"}
        key = json.dumps([recipe, _settings(entry["evaluation"])], sort_keys=True)
        while any(e["recipe"]["seed"] == entry["recipe"]["seed"] for e in by_recipe.get(key, [])):
            key += "'"  # the same seed from another start is another run
        by_recipe.setdefault(key, []).append(entry)
    groups = []
    for entries in by_recipe.values():
        first = entries[0]
        ids = [p["sample_id"] for p in first["predictions"]]
        for entry in entries[1:]:
            if [p["sample_id"] for p in entry["predictions"]] != ids:
                raise InputError(f"{entry['folder']} and {first['folder']} were evaluated on different rows")
        metrics = first["predictions"][0]["metrics"]
        recoveries = [e["evaluation"]["curves"].get("recovery") for e in entries]
        groups.append(
            _Group(
                name=str(first["folder"]),
                method=first["recipe"]["selfgen"]["method"],
                seeds=[e["recipe"]["seed"] for e in entries],
                sample_ids=ids,
                scores={m: np.array([[p["metrics"][m] for p in e["predictions"]] for e in entries]) for m in metrics},
                recovery=None if None in recoveries else np.mean(recoveries, axis=0).tolist(),
                settings=_settings(first["evaluation"]),
            )
        )
    return groups


def _settings(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What two evaluations must share to be comparable."""
    names = ("data", "prompt_column", "completion_column", "max_length", "sample_temperature")
    older = {"correction_rounds": 0, "cue": None}  # evaluations without them had none
    settings = evaluation["settings"]
    return {name: settings[name] for name in names} | {name: settings.get(name, older[name]) for name in older}


def _row(group: _Group, baseline: _Group, metric: str, rng: np.random.Generator) -> dict[str, Any]:
    values, reference = group.scores[metric], baseline.scores[metric]
    low, high = _interval(values, rng)
    row = {
        "run": group.name,
        "method": group.method,
        "seeds": group.seeds,
        "metric": metric,
        "mean": float(values.mean()),
        "low": low,
        "high": high,
        "paired_difference": None,
        "paired_low": None,
        "paired_high": None,
    }
    if group is not baseline:
        low, high = _interval(values, rng, reference)
        row |= {
            "paired_difference": float(values.mean() - reference.mean()),
            "paired_low": low,
            "paired_high": high,
        }
    return row


def _interval(values: np.ndarray, rng: np.random.Generator, reference: np.ndarray | None = None) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `[seeds, rows]`, or of its difference to `reference`, paired by row."""
    means = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        rows = rng.integers(values.shape[1], size=values.shape[1])
        means[i] = values[rng.integers(len(values), size=len(values))][:, rows].mean()
        if reference is not None:
            means[i] -= reference[rng.integers(len(reference), size=len(reference))][:, rows].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _markdown(rows: list[dict[str, Any]], groups: list[_Group], metrics: list[str]) -> str:
    by_key = {(row["run"], row["metric"]): row for row in rows}
    columns = [f"{g.method} ({g.name}, seeds {', '.join(map(str, g.seeds))})" for g in groups]
    lines = ["| metric | " + " | ".join(columns) + " |", "|---|" + "---|" * len(groups)]
    for metric in metrics:
        cells = []
        for group in groups:
            row = by_key[group.name, metric]
            cell = f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            if row["paired_difference"] is not None:
                cell += f" ({row['paired_difference']:+.3f} [{row['paired_low']:+.3f}, {row['paired_high']:+.3f}])"
            cells.append(cell)
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{len(groups[0].sample_ids)} rows of {groups[0].settings['data']}; mean [95 % interval]; ",
    ]
    lines[-1] += f"in brackets the difference to {groups[0].name}, paired by row."
    return "\n".join(lines) + "\n"


def _plot(groups: list[_Group], rows: list[dict[str, Any]], metrics: list[str], path: Path) -> None:
    with_recovery = all(group.recovery is not None for group in groups)
    rounds = groups[0].settings["correction_rounds"]
    beside = with_recovery + bool(rounds)
    figure, panels = plt.subplots(1, 1 + beside, figsize=(6 + 5 * beside, 4), layout="constrained", squeeze=False)
    bars, width = panels[0, 0], 0.8 / len(groups)
    row_of = {(row["run"], row["metric"]): row for row in rows}
    metrics = [m for m in metrics if not m.startswith("corrected_")]
    for number, group in enumerate(groups):
        values = [row_of[group.name, m] for m in metrics]
        means = np.array([v["mean"] for v in values])
        spread = np.abs(np.array([[v["low"], v["high"]] for v in values]).T - means)
        bars.bar(np.arange(len(metrics)) + number * width, means, width, yerr=spread, capsize=2, label=group.method)
        if with_recovery:
            curve = group.recovery or []
            panels[0, 1].plot(range(1, len(curve) + 1), curve, marker="o", label=group.method)
        if rounds:
            names = ["exact_match", *(corrected(i)["exact_match"] for i in range(1, rounds + 1))]
            shares = [row_of[group.name, name]["mean"] for name in names]
            panels[0, -1].plot(range(rounds + 1), shares, marker="o", label=group.method)
    bars.set_xticks(np.arange(len(metrics)) + 0.4 - width / 2, [m.replace("_", "\n") for m in metrics], fontsize=7)
    bars.set(ylabel="mean, 95 % interval", ylim=(0, 1.02))
    bars.legend()
    if with_recovery:
        panels[0, 1].set(xlabel="tokens after the forced error", ylabel="accuracy", ylim=(-0.02, 1.02))
        panels[0, 1].legend()
    if rounds:
        panels[0, -1].set(xlabel="corrections", ylabel="exact match", ylim=(-0.02, 1.02), xticks=range(rounds + 1))
        panels[0, -1].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
