"""The evaluated runs of a comparison: read from their folders, and put into groups that differ in the seed alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from selfgen_ds.comparison.costs import Cost, cost_of
from selfgen_ds.comparison.intervals import Sample
from selfgen_ds.comparison.run_scores import RunScores, read_scores
from selfgen_ds.config import EvaluateOptions, default_settings, flat
from selfgen_ds.errors import InputError
from selfgen_ds.evaluation import predictions
from selfgen_ds.evaluation.curves import Curves
from selfgen_ds.evaluation.metrics import metric_of
from selfgen_ds.files import refusal

_OF_ONE_RUN = {"seed", "output_dir", "resume", "run_name", "model.name_or_path", "data.date"}
"""Settings in which runs of one group may differ."""
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
    judged: list[dict[str, Any]]
    """Per run, the judge of its answers, and the win rate at equal length; empty without a judge."""
    runs: list[RunScores]
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
    def rows(self) -> int:
        """The number of rows that were evaluated."""
        return len(self.runs[0])

    @property
    def prompts(self) -> int:
        """The number of different prompts of these rows."""
        return len(np.unique(self.runs[0].prompts))

    @property
    def metrics(self) -> list[str]:
        """The metrics that some row of every run counts, in the order in which the evaluation gives them."""
        return [
            name
            for name in self.runs[0].statistics
            if all(name in run.statistics and run.statistics[name].any() for run in self.runs)
        ]

    @property
    def judges(self) -> list[str]:
        """Per run, the judge of its answers and what they were compared with; empty without a judge."""
        return [f"{judged['judge']} against {judged['against']}" if judged else "" for judged in self.judged]

    @property
    def curves(self) -> Curves:
        """What the rows of all runs say by position."""
        return reduce(Curves.__add__, [run.curves for run in self.runs])

    def sample(self, metric: str, chosen: np.ndarray | None = None) -> Sample:
        """Return the statistics of a metric, of which the rows with one prompt are one: they err together.

        A row that does not count the metric has zeros.

        Args:
            chosen: `[rows]` bool, which rows count; by default all.
        """
        rows = np.ones(self.rows, dtype=bool) if chosen is None else chosen
        prompts = np.unique(self.runs[0].prompts[rows], return_inverse=True)[1]
        statistics = np.stack([_sums(run.statistics[metric][rows], prompts) for run in self.runs])
        return Sample(statistics=statistics, of_sums=metric_of(metric).of_sums, fixed=not self.seeds)


def _sums(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the sums of the rows of `values` that have the same number, which count from 0."""
    sums = np.zeros((numbers.max(initial=-1) + 1, *values.shape[1:]))
    np.add.at(sums, numbers, values)
    return sums


def load_run(folder: Path) -> dict[str, Any]:
    """Read a run's recipe, which a base model has not, its evaluation, and its predictions.

    Raises:
        InputError: A file is missing, damaged, or empty.
    """
    recipe, evaluation, steps = folder / "config.yaml", folder / "evaluation.json", folder / "metrics.jsonl"
    run: dict[str, Any] = {"folder": folder, "recipe": None, "cost": None}
    with _reading(recipe):
        run["recipe"] = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.exists() else None
        if run["recipe"] is not None:
            run["recipe"]["seed"], run["recipe"]["selfgen"]["method"], run["recipe"]["model"], run["recipe"]["data"]
    with _reading(evaluation):
        run["evaluation"] = json.loads(evaluation.read_text(encoding="utf-8"))
        run["evaluation"]["settings"]["data"]
    with _reading(folder / predictions.FILE):
        run["scores"] = read_scores(folder / predictions.FILE)
        if run["evaluation"].get("predictions") not in (None, predictions.checksum(folder / predictions.FILE)):
            raise InputError(f"{folder / predictions.FILE}: not the rows of {evaluation}; evaluate the model again")
    with _reading(steps):
        run["cost"] = cost_of(steps) if steps.exists() else None
    if not len(run["scores"]):
        raise InputError(f"{folder / predictions.FILE}: no rows")
    return run


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Let the errors of a block that reads a file be one line that names the file.

    Raises:
        InputError: The file is missing, cannot be read, or is not as expected.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: missing; evaluate the run's model with --output_dir {path.parent}") from error
    except OSError as error:
        raise InputError(refusal(error) or f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, yaml.YAMLError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}: damaged, or not as train and evaluate write it ({told})") from error


def grouped(runs: list[dict[str, Any]]) -> list[Group]:
    """Put runs that differ only in the seed into one group, in the order of the first runs of the groups.

    A setting that a run of an older version does not have counts as the default.

    Raises:
        InputError: Runs of a group were evaluated on different rows.
    """
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for entry in runs:
        if entry["recipe"] is None:
            by_recipe[str(entry["folder"])] = [entry]
            continue
        settings = default_settings() | flat(entry["recipe"])
        recipe = {name: value for name, value in settings.items() if name not in _OF_ONE_RUN}
        evaluation = entry["evaluation"]
        key = json.dumps([recipe, _settings(evaluation), evaluation.get("dtype")], sort_keys=True)
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
    for group in groups:
        differing = [
            f"with {name} {value!r} and {baseline.settings[name]!r}"
            for name, value in group.settings.items()
            if value != baseline.settings[name]
        ]
        if not differing and not np.array_equal(group.runs[0].sample_ids, baseline.runs[0].sample_ids):
            differing = [f"on different rows ({_first_difference(group, baseline)})"]
        if not differing and group.runs[0].references != baseline.runs[0].references:
            differing = ["on rows with other references, by a changed file or another tokenizer"]
        if differing:
            how = ", ".join(differing)
            raise InputError(f"{group.name} and {baseline.name} were evaluated {how}; evaluate them alike")


def _first_difference(group: Group, other: Group) -> str:
    ids = [one.runs[0].sample_ids.tolist() for one in (group, other)]
    if len(ids[0]) != len(ids[1]):
        return f"{len(ids[0])} and {len(ids[1])} of them"
    line = next(i for i, (a, b) in enumerate(zip(*ids, strict=True)) if a != b)
    return f"the first is line {line + 1} of {predictions.FILE}: sample {ids[0][line]} and {ids[1][line]}"


def _as_group(runs: list[dict[str, Any]]) -> Group:
    runs = sorted(runs, key=lambda entry: entry["recipe"]["seed"]) if runs[0]["recipe"] else runs
    first = runs[0]
    for other in runs[1:]:
        same_rows = np.array_equal(other["scores"].sample_ids, first["scores"].sample_ids)
        if not (same_rows and other["scores"].references == first["scores"].references):
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
        judged=[entry["evaluation"].get("judged") or {} for entry in runs],
        runs=[entry["scores"] for entry in runs],
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
