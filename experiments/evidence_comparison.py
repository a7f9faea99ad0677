"""Differences between the arms of a study and a baseline, from the lines of `results/STUDY.jsonl`.

Runs with the same seed start from the same model and answer the same rows, so that each seed gives one difference.
Their mean has the interval of Student's t: it says how far other seeds would differ on these rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import stats

from experiments.evidence_metrics import TESTED
from experiments.evidence_study import PLAN
from selfgen_ds.comparison.intervals import holm
from selfgen_ds.evaluation.metrics import metric_of

Line = dict[str, Any]
_LEVEL = 0.05
_LEAST_SEEDS = 3
"""Seeds that a verdict needs: two can lie close together by chance."""
_PRECISION = 0.001
"""Least standard deviation between seeds: that of a few seeds may be 0 by chance, and no more digits are shown."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An arm's metric minus that of the baseline, as a mean over the seeds that both have."""

    value: float
    low: float
    """Lower end of the 95 % interval; NaN with one seed, as is `high`."""
    high: float
    p: float
    """Corrected for the number of metrics of the arm (Holm 1979); NaN with fewer than three seeds."""
    verdict: Literal["better", "worse", "differs", ""]
    """Empty if the difference may be chance."""


def arms_of(lines: list[Line]) -> list[str]:
    """Return the arms of some runs in the order of `evidence.yaml`; what it does not name comes last."""
    order = {name: place for place, name in enumerate(PLAN["arms"])}
    return sorted({line["arm"] for line in lines}, key=lambda arm: (order.get(arm, len(order)), arm))


def differences(lines: list[Line], baseline: str = "sft") -> dict[tuple[str, str], Difference]:
    """Return the differences of all other arms to a baseline, by arm and metric, in the metrics that are tested.

    Args:
        lines: The runs of one part of a study.
        baseline: An arm; without runs of it, there are no differences.
    """
    values = {(line["arm"], line["seed"]): line["metrics"] for line in lines}
    found: dict[tuple[str, str], Difference] = {}
    for arm in arms_of(lines):
        if arm == baseline:
            continue
        seeds = [seed for other, seed in values if other == arm and (baseline, seed) in values]
        of_arm = {}
        for metric in TESTED:
            pairs = [(values[arm, seed].get(metric), values[baseline, seed].get(metric)) for seed in seeds]
            if pairs and not any(None in pair for pair in pairs):
                of_arm[metric] = _of_seeds(np.array([ours - theirs for ours, theirs in pairs]))
        found |= {(arm, metric): one for metric, one in _corrected(of_arm).items()}
    return found


def _of_seeds(values: np.ndarray) -> Difference:
    """Return the mean of the differences of the seeds: `[seeds]`; it has no verdict yet."""
    mean, degrees = float(values.mean()), len(values) - 1
    if degrees == 0:
        return Difference(value=mean, low=math.nan, high=math.nan, p=math.nan, verdict="")
    error = max(float(values.std(ddof=1)), _PRECISION) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.975, degrees)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, degrees)) if len(values) >= _LEAST_SEEDS else math.nan
    return Difference(value=mean, low=mean - half, high=mean + half, p=p, verdict="")


def _corrected(of_arm: dict[str, Difference]) -> dict[str, Difference]:
    """Correct the p of an arm's metrics for their number; a metric that is equal on every seed tests nothing."""
    tested = [metric for metric, one in of_arm.items() if one.value != 0 and not math.isnan(one.p)]
    corrected = dict(zip(tested, holm([of_arm[metric].p for metric in tested]), strict=True))
    for metric, p in corrected.items():
        one = of_arm[metric]
        of_arm[metric] = replace(one, p=p, verdict=_verdict(metric, one.value) if p < _LEVEL else "")
    return of_arm


def _verdict(metric: str, difference: float) -> Literal["better", "worse", "differs"]:
    better = metric_of(metric).better
    if not better:
        return "differs"
    return "better" if (difference > 0) == (better == "higher") else "worse"
