"""`selfgen-ds compare`: several evaluated runs -> one table (Markdown, JSON) and one plot.

Runs whose recipes differ only in the seed, the starting model, and the output folder form one group, which is one row
of the table. Intervals are 95 % bootstrap percentiles over seeds and rows; differences to the baseline are paired by
row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from selfgen_ds.config import CompareOptions
from selfgen_ds.errors import InputError, Problems
from selfgen_ds.evaluation.metrics import Curve, binned, descriptions
from selfgen_ds.evaluation.plots import plot_comparison
from selfgen_ds.files import make_folder, write_atomically
from selfgen_ds.validation.options import check_compare

_RESAMPLES = 2000
_OF_ONE_RUN = {"seed", "output_dir", "resume", "run_name"}
"""Settings in which runs of one group may differ, besides the starting model and the date."""


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Runs that differ only in the seed; named after the first of them."""

    name: str
    method: str
    """Empty for a model that no recipe is known of, such as the base model."""
    seeds: list[int]
    sample_ids: list[int]
    scores: dict[str, np.ndarray]
    """Metric -> `[seeds, rows]`."""
    tokens: np.ndarray
    """`[seeds, rows]`, the target tokens of each row, with which the loss is weighted."""
    recovery: Curve | None
    """Accuracy after a forced error over all rows and seeds; None without a built-in task."""
    unfinished: int | None
    """Greedy answers of all seeds that were cut before the model ended them; None if an evaluation has no count."""
    settings: dict[str, Any]
    """Settings of the evaluation, which must equal the baseline's."""

    @property
    def label(self) -> str:
        """The folder, and the method and seeds if they are known."""
        seeds = f", seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}" if self.seeds else ""
        return f"{self.method} ({self.name}{seeds})" if self.method else self.name

    def weights(self, metric: str) -> np.ndarray:
        """Return the weights of rows in a mean: `[seeds, rows]`."""
        return self.tokens if metric == "loss" else np.ones_like(self.tokens)


def run(options: CompareOptions) -> None:
    """Compare evaluated runs, and write the table and the plot.

    Raises:
        InputError: A run is given twice, missing or damaged, or the runs were evaluated on different rows or settings.
    """
    problems = Problems()
    check_compare(problems, options)
    runs = []
    for run in options.runs:
        with problems.collect():
            runs.append(_load(Path(run)))
    problems.raise_all()
    try:
        groups = _group(runs)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{', '.join(options.runs)}: not as train and evaluate write them ({error!r}); evaluate them again"
        ) from error
    baseline = groups[0]
    _check_comparable(groups)
    rounds = baseline.settings["correction_rounds"]
    metrics = [m for m in descriptions(rounds) if all(m in group.scores for group in groups)]
    folder = Path(options.output_dir)
    make_folder(folder, "--output_dir")
    rng = np.random.default_rng(0)
    rows = [_row(group, baseline, metric, rng) for group in groups for metric in metrics]
    write_atomically(folder / "comparison.json", json.dumps({"baseline": baseline.name, "rows": rows}, indent=1))
    table = _markdown(rows, groups, metrics)
    write_atomically(folder / "comparison.md", table)
    title = f"{_paths(baseline.settings['data'])}, {len(baseline.sample_ids)} rows, 95 % intervals"
    plot_comparison(folder / "comparison.png", title, rows, {group.name: group.recovery for group in groups}, rounds)
    print(table)
    print(f"written to {folder}/comparison.json, comparison.md and comparison.png")


def _check_comparable(groups: list[_Group]) -> None:
    """Check that all groups were evaluated on the same rows in the same way.

    Raises:
        InputError: The rows or a setting of the evaluation differ.
    """
    baseline = groups[0]
    for group in groups:
        if (group.settings, group.sample_ids) == (baseline.settings, baseline.sample_ids):
            continue
        differing = [
            f"with {name} {value!r} and {baseline.settings[name]!r}"
            for name, value in group.settings.items()
            if value != baseline.settings[name]
        ]
        how = ", ".join(differing) or "on different rows"
        raise InputError(f"{group.name} and {baseline.name} were evaluated {how}; evaluate them alike")


def _load(folder: Path) -> dict[str, Any]:
    """Read a run's recipe, which a base model has not, its evaluation, and its predictions.

    Raises:
        InputError: A file is missing, damaged, or empty.
    """
    try:
        written = folder / "config.yaml"
        recipe = yaml.safe_load(written.read_text(encoding="utf-8")) if written.exists() else None
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        with open(folder / "predictions.jsonl", encoding="utf-8") as file:
            predictions = [json.loads(line) for line in file]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{error.filename}: missing; evaluate the run's model with --output_dir {folder}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{folder}: {' '.join(str(error).split())}") from error
    if not predictions:
        raise InputError(f"{folder}/predictions.jsonl: no rows")
    return {"folder": folder, "recipe": recipe, "evaluation": evaluation, "predictions": predictions}


def _group(runs: list[dict[str, Any]]) -> list[_Group]:
    """Put runs that differ only in the seed into one group, in the order of the first runs of the groups.

    Raises:
        InputError: Runs of a group were evaluated on different rows.
    """
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for entry in runs:
        if entry["recipe"] is None:
            by_recipe[str(entry["folder"])] = [entry]
            continue
        recipe = {k: v for k, v in entry["recipe"].items() if k not in _OF_ONE_RUN}
        recipe["model"] = {k: v for k, v in recipe["model"].items() if k != "name_or_path"}
        recipe["data"] = {k: v for k, v in entry["recipe"]["data"].items() if k != "date"}
        key = json.dumps([recipe, _settings(entry["evaluation"])], sort_keys=True)
        while any(e["recipe"]["seed"] == entry["recipe"]["seed"] for e in by_recipe.get(key, [])):
            key += "'"  # the same seed from another starting model is a run of another group
        by_recipe.setdefault(key, []).append(entry)
    return [_as_group(entries) for entries in by_recipe.values()]


def _as_group(runs: list[dict[str, Any]]) -> _Group:
    first = runs[0]
    sample_ids = [prediction["sample_id"] for prediction in first["predictions"]]
    for other in runs[1:]:
        if [prediction["sample_id"] for prediction in other["predictions"]] != sample_ids:
            raise InputError(f"{other['folder']} and {first['folder']} were evaluated on different rows")
    metrics = first["predictions"][0]["metrics"]
    recovery = [p.get("recovery") for entry in runs for p in entry["predictions"]]
    recipes = [entry["recipe"] for entry in runs if entry["recipe"] is not None]
    unfinished = [entry["evaluation"].get("unfinished") for entry in runs]
    return _Group(
        name=str(first["folder"]),
        method=recipes[0]["selfgen"]["method"] if recipes else "",
        seeds=[recipe["seed"] for recipe in recipes],
        sample_ids=sample_ids,
        scores={m: np.array([[p["metrics"][m] for p in entry["predictions"]] for entry in runs]) for m in metrics},
        tokens=np.array([[p["tokens"] for p in entry["predictions"]] for entry in runs], dtype=float),
        recovery=None if None in recovery else binned([row[:-1] for row in recovery]),
        unfinished=None if None in unfinished else sum(unfinished),
        settings=_settings(first["evaluation"]),
    )


def _settings(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that two evaluations must share to be comparable."""
    names = ("data", "prompt_column", "completion_column", "max_length", "sample_temperature")
    newer: dict[str, Any] = {"correction_rounds": 0, "cue": None, "max_new_tokens": None}  # older ones lack these
    newer |= {"as_chat": None, "prompt_template": "{prompt}", "messages_column": "messages"}
    newer |= {"chat_template": None, "max_refused_share": 0.0}
    settings = newer | evaluation["settings"]
    return {name: settings[name] for name in (*names, *newer)}


def _row(group: _Group, baseline: _Group, metric: str, rng: np.random.Generator) -> dict[str, Any]:
    """Return a row of `comparison.json`; the baseline's has no difference."""
    values, weights = group.scores[metric], group.weights(metric)
    low, high = _interval(values, weights, rng)
    row: dict[str, Any] = {
        "run": group.name,
        "label": group.label,
        "method": group.method,
        "seeds": group.seeds,
        "metric": metric,
        "mean": _mean(values, weights),
        "low": low,
        "high": high,
        "paired_difference": None,
        "paired_low": None,
        "paired_high": None,
    }
    if group is not baseline:
        reference = (baseline.scores[metric], baseline.weights(metric))
        row["paired_difference"] = row["mean"] - _mean(*reference)
        row["paired_low"], row["paired_high"] = _interval(values, weights, rng, reference)
    return row


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float((values * weights).sum() / weights.sum())


def _interval(
    values: np.ndarray,
    weights: np.ndarray,
    rng: np.random.Generator,
    reference: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a weighted mean, or of the difference of two, paired by row.

    The ends of the interval are percentiles over `_RESAMPLES` draws of seeds and rows with replacement (Efron &
    Tibshirani 1993, chapter 13).

    Args:
        values: `[seeds, rows]`.
        weights: `[seeds, rows]`.
        reference: Values and weights of the mean that is subtracted; both sides share the drawn rows.
    """
    means = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        rows = np.asarray(rng.integers(values.shape[1], size=values.shape[1]))
        means[i] = _mean(*_drawn(values, weights, rows, rng))
        if reference is not None:
            means[i] -= _mean(*_drawn(*reference, rows, rng))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _drawn(
    values: np.ndarray, weights: np.ndarray, rows: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return values and weights of some rows, of as many drawn seeds as there are."""
    seeds = rng.integers(len(values), size=len(values))
    return values[seeds][:, rows], weights[seeds][:, rows]


def _paths(data: Any) -> str:
    """Return the paths of an evaluation's sources."""
    sources = data if isinstance(data, list) else [data]
    return ", ".join(source if isinstance(source, str) else source["path"] for source in sources)


def _markdown(rows: list[dict[str, Any]], groups: list[_Group], metrics: list[str]) -> str:
    """Return a Markdown table with a line per metric and a column per group."""
    row_of = {(row["run"], row["metric"]): row for row in rows}
    lines = ["| metric | " + " | ".join(group.label for group in groups) + " |", "|---|" + "---|" * len(groups)]
    for metric in metrics:
        cells = []
        for group in groups:
            row = row_of[group.name, metric]
            cell = f"{row['mean']:z.3f} [{row['low']:z.3f}, {row['high']:z.3f}]"
            if row["paired_difference"] is not None:
                cell += f" ({row['paired_difference']:+z.3f} [{row['paired_low']:+z.3f}, {row['paired_high']:+z.3f}])"
            cells.append(cell)
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    caption = f"{len(groups[0].sample_ids)} rows of {_paths(groups[0].settings['data'])}; mean [95 % interval]"
    if len(groups) > 1:
        caption += f"; in parentheses the difference to {groups[0].name}, paired by row"
    caption += "."
    if all(group.unfinished is not None for group in groups):
        counts = ", ".join(f"{g.unfinished} of {g.tokens.size} ({g.name})" for g in groups)
        caption += f"\nGreedy answers that were cut at the longest length before the model ended them: {counts}."
    return "\n".join([*lines, "", caption]) + "\n"
