"""The verdicts of a pilot: per method and metric, whether the method helps, harms, or shows no difference to sft."""

from __future__ import annotations

from typing import Any

import numpy as np

from selfgen_ds.comparison.intervals import (
    LEAST_ROWS,
    Estimate,
    difference,
    holm,
    rows_and_seeds_needed,
    rows_needed,
    seeds_needed,
)
from selfgen_ds.comparison.runs import Group
from selfgen_ds.evaluation.metrics import kind_and_metric, metric_of

LEVEL = 0.05
_QUALITY = ("final_answer", "exact_match", "rouge_l", "chrf")
"""Metrics of answers; a row of verdicts has the first that says something, and ROUGE-L."""


def chosen_metrics(groups: list[Group]) -> list[str]:
    """Return the metrics of the verdicts if the user names none.

    There are few of them, because each one more makes the others less sure: the quality of greedy, sampled and
    corrected answers, the tokens after a forced error, and the loss.
    """
    known = [name for name in groups[0].metrics if all(name in group.metrics for group in groups)]
    telling = [name for name in _QUALITY if name in known and any(_mean(group, name) > 0 for group in groups)]
    quality = list(dict.fromkeys(telling[:1] + [name for name in telling if name == "rouge_l"]))
    kinds = dict.fromkeys(kind_and_metric(name)[0] for name in known)
    answers = [kind for kind in kinds if kind == "" or kind.startswith(("sampled_", "corrected_"))]
    names = [f"{kind}_{name}".lstrip("_") for kind in answers for name in quality]
    return [name for name in [*names, "recovery_4", "loss"] if name in known]


def verdicts(groups: list[Group], metrics: list[str]) -> list[dict[str, Any]]:
    """Return the verdict of every method and metric. The first group is sft.

    Only methods that learn to correct themselves are judged by corrections. A corrected answer is compared with the
    answer of sft, which is not asked for a correction. The p-values are corrected together for their number (Holm).
    """
    return _worded([_row(group, groups[0], metric) for group, metric in _pairs(groups, metrics)])


def verdicts_by_kind(groups: list[Group], metrics: list[str], kinds: list[str]) -> list[dict[str, Any]]:
    """Return the verdicts for every kind of rows that has enough rows, corrected together.

    Args:
        kinds: `[rows]`, the kind of every row.
    """
    rows = []
    for kind in dict.fromkeys(kinds):
        of_kind = np.array([other == kind for other in kinds])
        if of_kind.sum() >= LEAST_ROWS:
            pairs = _pairs(groups, metrics)
            rows += [{"kind": kind, **_row(group, groups[0], metric, of_kind)} for group, metric in pairs]
    return _worded(rows)


def _pairs(groups: list[Group], metrics: list[str]) -> list[tuple[Group, str]]:
    """Return the methods, each with the metrics that it is judged by."""
    return [
        (group, metric)
        for group in groups[1:]
        for metric in metrics
        if _corrects(group) or not kind_and_metric(metric)[0].startswith("corrected_")
    ]


def _corrects(group: Group) -> bool:
    return group.recipe is not None and group.recipe["selfgen"]["method"] == "rac"


def _row(group: Group, baseline: Group, metric: str, of_kind: np.ndarray | None = None) -> dict[str, Any]:
    kind, base = kind_and_metric(metric)
    of_baseline = base if kind.startswith("corrected_") else metric
    ours, theirs = group.sample(metric, of_kind), baseline.sample(of_baseline, of_kind)
    found = difference(ours, theirs, same_seeds=group.seeds == baseline.seeds)
    return {
        "method": group.method,
        "metric": metric,
        "verdict": "",
        "baseline": float(theirs.values.mean()),
        "value": float(ours.values.mean()),
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "rows": group.rows if of_kind is None else int(of_kind.sum()),
        "counted": found.counted,
        "seeds": len(group.seeds),
        "estimate": found,
    }


def _worded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add p after the correction, the verdict, and the rows and seeds that could tell more, to rows of verdicts.

    With a single seed, nothing is known of other seeds, and nothing is shown.
    """
    tested = [row for row in rows if row["counted"] >= LEAST_ROWS]  # the others cannot show anything (Tarone 1990)
    for row in rows:
        row["p_corrected"] = 1.0
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_corrected"] = corrected
    for row in rows:
        found: Estimate = row.pop("estimate")
        better = metric_of(row["metric"]).better
        shown = row["p_corrected"] < LEVEL and found.seeds_known and np.isfinite(found.value)
        helps = (found.value > 0) == (better == "higher")
        row["verdict"] = ("helps" if helps else "harms") if shown else "no difference shown"
        row |= {"rows_needed": None, "seeds_needed": None, "rows_and_seeds_needed": None}
        if not shown and np.isfinite(found.value) and found.value != 0:
            level = LEVEL / max(1, len(tested))
            row["rows_needed"] = rows_needed(found, row["rows"], level)
            row["seeds_needed"] = seeds_needed(found, row["seeds"], level)
            row["rows_and_seeds_needed"] = rows_and_seeds_needed(found, row["rows"], row["seeds"], level)
    return rows


def _mean(group: Group, metric: str) -> float:
    return float(group.sample(metric).values.mean())
