"""The evaluated runs of a comparison: read from their folders, and put into groups that differ in the seed alone."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from selfgen_ds.comparison.costs import Cost, cost_of
from selfgen_ds.comparison.intervals import Sample
from selfgen_ds.config import EvaluateOptions
from selfgen_ds.errors import InputError
from selfgen_ds.evaluation.metrics import metric_of

_OF_ONE_RUN = {"seed", "output_dir", "resume", "run_name"}
"""Settings in which runs of one group may differ, besides the starting model and the date."""
_OF_ONE_EVALUATION = {
    *("model", "output_dir", "dtype", "attn_implementation", "trust_remote_code", "batch_size", "seed"),
    *("date", "max_samples", "judge_url", "judge_model", "judge_against"),
}
"""Options of `evaluate` in which comparable evaluations may differ; their rows are compared themselves."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ only in the seed; named after the first of them."""

    name: str
    method: str
    """Empty for a model that no recipe is known of, such as the base model."""
    seeds: list[int]
    recipe: dict[str, Any] | None
    """The first run's settings."""
    settings: dict[str, Any]
    """Settings of the evaluation, which must equal the baseline's."""
    dtype: str
    """Type of the weights in the evaluation."""
    predictions: list[list[dict[str, Any]]]
    """Per run, the lines of `predictions.jsonl`."""
    cost: Cost | None
    """The mean cost of the runs; None if a run has no `metrics.jsonl`."""
    unfinished: int | None
    """Greedy answers of all runs that were cut before the model ended them; None if an evaluation has no count."""

    @property
    def label(self) -> str:
        """The folder, and the method and seeds if they are known."""
        seeds = f", seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}" if self.seeds else ""
        return f"{self.method} ({self.name}{seeds})" if self.method else self.name

    @property
    def sample_ids(self) -> list[int]:
        """The rows that were evaluated."""
        return [prediction["sample_id"] for prediction in self.predictions[0]]

    @property
    def metrics(self) -> list[str]:
        """The metrics that some row of every run counts, in the order in which the evaluation gives them."""
        counted = [
            {name: None for p in run for name, numbers in p["statistics"].items() if any(numbers)}
            for run in self.predictions
        ]
        return [name for name in counted[0] if all(name in of_run for of_run in counted)]

    def sample(self, metric: str) -> Sample:
        """Return the statistics of a metric; a row that does not count it has zeros."""
        rows = [[p["statistics"].get(metric) for p in run] for run in self.predictions]
        size = next(len(numbers) for run in rows for numbers in run if numbers is not None)
        filled = [[numbers or [0.0] * size for numbers in run] for run in rows]
        return Sample(statistics=np.array(filled, dtype=np.float64), of_sums=metric_of(metric).of_sums)


def load_run(folder: Path) -> dict[str, Any]:
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
        steps = folder / "metrics.jsonl"
        cost = cost_of(steps) if steps.exists() else None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{error.filename}: missing; evaluate the run's model with --output_dir {folder}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{folder}: {' '.join(str(error).split())}") from error
    if not predictions:
        raise InputError(f"{folder}/predictions.jsonl: no rows")
    if any("statistics" not in prediction for prediction in predictions):
        raise InputError(f"{folder}/predictions.jsonl: of an older version; evaluate the model again")
    return {"folder": folder, "recipe": recipe, "evaluation": evaluation, "predictions": predictions, "cost": cost}


def grouped(runs: list[dict[str, Any]]) -> list[Group]:
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


def check_comparable(groups: list[Group]) -> None:
    """Check that all groups were evaluated on the same rows in the same way.

    Raises:
        InputError: The rows or a setting of the evaluation differ.
    """
    baseline = groups[0]
    references = [prediction["reference"] for prediction in baseline.predictions[0]]
    for group in groups:
        differing = [
            f"with {name} {value!r} and {baseline.settings[name]!r}"
            for name, value in group.settings.items()
            if value != baseline.settings[name]
        ]
        if not differing and group.sample_ids != baseline.sample_ids:
            differing = ["on different rows"]
        if not differing and [prediction["reference"] for prediction in group.predictions[0]] != references:
            differing = ["on rows with other references, by a changed file or another tokenizer"]
        if differing:
            how = ", ".join(differing)
            raise InputError(f"{group.name} and {baseline.name} were evaluated {how}; evaluate them alike")


def _as_group(runs: list[dict[str, Any]]) -> Group:
    runs = sorted(runs, key=lambda entry: entry["recipe"]["seed"]) if runs[0]["recipe"] else runs
    first = runs[0]
    rows = [(prediction["sample_id"], prediction["reference"]) for prediction in first["predictions"]]
    for other in runs[1:]:
        if [(prediction["sample_id"], prediction["reference"]) for prediction in other["predictions"]] != rows:
            raise InputError(f"{other['folder']} and {first['folder']} were evaluated on different rows")
    recipes = [entry["recipe"] for entry in runs if entry["recipe"] is not None]
    unfinished = [entry["evaluation"].get("unfinished") for entry in runs]
    costs = [entry["cost"] for entry in runs]
    return Group(
        name=str(first["folder"]),
        method=recipes[0]["selfgen"]["method"] if recipes else "",
        seeds=[recipe["seed"] for recipe in recipes],
        recipe=recipes[0] if recipes else None,
        settings=_settings(first["evaluation"]),
        dtype=first["evaluation"].get("dtype", ""),
        predictions=[entry["predictions"] for entry in runs],
        cost=None if None in costs else Cost.mean(costs),
        unfinished=None if None in unfinished else sum(unfinished),
    )


def _settings(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that two evaluations must share to be comparable."""
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(EvaluateOptions)
    }
    return {
        name: evaluation["settings"].get(name, default)
        for name, default in defaults.items()
        if name not in _OF_ONE_EVALUATION
    }
