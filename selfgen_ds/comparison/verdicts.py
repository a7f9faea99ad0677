"""What follows from the differences between runs, in numbers and in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from selfgen_ds.comparison.intervals import LEAST_ROWS, Estimate, difference, holm, mean, wilson
from selfgen_ds.comparison.runs import Group
from selfgen_ds.evaluation.metrics import kind_and_metric, meaning, metric_of
from selfgen_ds.progress import SECONDS, bar

Verdict = Literal["better", "worse", "differs", "not sure", "no difference shown", "not finite"]
"""`not sure`: the interval excludes 0, but p is too large after the correction for the number of differences."""
_LEVEL = 0.05
_TELLING = (
    *("final_answer", "exact_match", "rouge_l", "embedding_distance", "win_rate", "recovery_1", "recovery_last"),
    *("after_slip_4", "loss", "free_running_accuracy", "calibration_error"),
)
"""Metrics that are named first."""
_MOST = 8
"""Most metrics that a sentence names; the tables have all."""
_BUDGET = 0.02
"""Largest relative difference of two budgets that count as equal."""


def compared(groups: list[Group], metrics: list[str]) -> list[dict[str, Any]]:
    """Return the rows of `comparison.json`: one per group and metric. The baseline is the first group.

    The p-values of the differences in the table are corrected together, for their number. Those that cannot show
    anything, because hardly any row counts, do not count in that number (after Tarone 1990).
    """
    baseline = groups[0]
    pairs = [(group, metric) for group in groups for metric in metrics]
    told = bar("compare", "metric", iterable=pairs, total=len(pairs), leave=False, delay=SECONDS)
    rows = [_row(group, baseline, metric) for group, metric in told]
    for row in rows:
        row["p_corrected"] = None if row["p"] is None else 1.0
    for row, corrected in zip(tested(rows), holm([row["p"] for row in tested(rows)]), strict=True):
        row["p_corrected"] = corrected
    for row in rows:
        row["verdict"] = None if row["p"] is None else _verdict(row)
    return rows


def tested(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows whose differences are tested, and count in the correction."""
    return [row for row in rows if row["p"] is not None and row["counted"] >= LEAST_ROWS]


def _row(group: Group, baseline: Group, metric: str) -> dict[str, Any]:
    sample = group.sample(metric)
    estimate = mean(sample)
    low, high = _within_range(metric, estimate, int(sample.counted.sum()))
    row: dict[str, Any] = {
        "run": group.name,
        "label": group.label,
        "method": group.method,
        "seeds": group.seeds,
        "metric": metric,
        "mean": estimate.value,
        "low": low,
        "high": high,
        "paired_difference": None,
        "paired_low": None,
        "paired_high": None,
        "p": None,
        "counted": estimate.counted,
        "seeds_known": estimate.seeds_known,
    }
    if group is not baseline:
        same_seeds = bool(group.seeds) and group.seeds == baseline.seeds
        found = difference(sample, baseline.sample(metric), same_seeds)
        row |= {"paired_difference": found.value, "paired_low": found.low, "paired_high": found.high, "p": found.p}
        row |= {"counted": found.counted, "seeds_known": found.seeds_known}
    return row


def _within_range(metric: str, estimate: Estimate, rows: int) -> tuple[float, float]:
    """Return the ends of a mean's interval inside the range of the metric.

    A share that is 0 or 1 on every row says less than a width of 0: it gets Wilson's interval.
    """
    scale = metric_of(metric).scale
    if not math.isfinite(estimate.value):
        return estimate.low, estimate.high
    if scale == 1 and estimate.low == estimate.high and estimate.value in (0.0, 1.0):
        return wilson(estimate.value, rows)
    least = metric_of(metric).least
    low = estimate.low if least is None else max(least, estimate.low)
    return (low, min(scale, estimate.high)) if scale == 1 else (low, estimate.high)


def _verdict(row: dict[str, Any]) -> Verdict:
    found, better = row["paired_difference"], metric_of(row["metric"]).better
    if not math.isfinite(found):
        return "not finite"
    if row["p_corrected"] >= _LEVEL:
        return "not sure" if row["p"] < _LEVEL else "no difference shown"
    if not better:
        return "differs"
    return "better" if (found > 0) == (better == "higher") else "worse"


def rule(rows: list[dict[str, Any]]) -> str:
    """Return the rule by which a difference gets a word."""
    return (
        f"A difference is called better or worse if its p, corrected for the {len(tested(rows))} differences of this "
        f"report (Holm), is below 5 %, and if rows of at least {LEAST_ROWS} prompts count in it."
    )


def budgets(groups: list[Group]) -> str:
    """Return a sentence on budgets that are not equal; empty if all are within 2 %, or if none is known."""
    costs = {group.label: group.cost.flops for group in groups if group.cost is not None}
    unknown = [group.label for group in groups if group.cost is None and group.recipe is not None]
    told = []
    if costs and max(costs.values()) > (1 + _BUDGET) * min(costs.values()):
        least = min(costs.values())
        shares = ", ".join(f"{label} {flops / least:.2f}" for label, flops in costs.items())
        told.append(f"The budgets differ: relative to the least number of operations, {shares}.")
    if unknown:
        told.append(f"The budget is not known of {', '.join(unknown)}.")
    return " ".join(told)


def other_judges(groups: list[Group]) -> str:
    """Return a sentence on win rates that cannot be compared; empty if there are none, or one judge gave them all."""
    judges = dict.fromkeys(judge for group in groups for judge in group.judges)
    if len(judges) < 2:
        return ""
    told = ", ".join(judge or "none" for judge in judges)
    return f"win_rate is left out, because the judges or what they compared with differ: {told}."


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What follows for a group."""

    subject: str
    sentences: list[str]


def conclusions(rows: list[dict[str, Any]], groups: list[Group]) -> list[Conclusion]:
    """Return what follows for every group but the baseline, as far as the intervals allow a word."""
    baseline = groups[0]
    return [
        Conclusion(
            subject=f"{group.label}, compared with {baseline.label}",
            sentences=_sentences([row for row in rows if row["run"] == group.name], group, baseline),
        )
        for group in groups[1:]
    ]


def _sentences(rows: list[dict[str, Any]], group: Group, baseline: Group) -> list[str]:
    told, of_two_runs = [], not all(row["seeds_known"] for row in rows)
    if of_two_runs:
        told.append("Neither side has a second seed: the words hold for these two models, not for other seeds.")
    elif min(len(group.seeds) or 3, len(baseline.seeds) or 3) < 3:
        told.append("With fewer than three seeds on a side, hardly any difference can be sure.")
    for verdict in ("better", "worse", "differs"):
        if found := [row for row in rows if row["verdict"] == verdict]:
            told.append(f"{verdict.capitalize()} in {_listed(found, _told)}.")
    if unsure := [row for row in rows if row["verdict"] == "not sure"]:
        told.append(f"Not sure, after the correction for the number of differences, in {_listed(unsure, _told)}.")
    if undecided := [row for row in rows if row["verdict"] == "no difference shown"]:
        told.append(f"No difference shown in {_listed(undecided, lambda row: str(row['metric']))}.")
    if broken := [row["metric"] for row in rows if row["verdict"] == "not finite"]:
        told.append(f"Not finite, here or in the baseline, in {', '.join(broken)}.")
    return told


def _listed(rows: list[dict[str, Any]], told: Callable[[dict[str, Any]], str]) -> str:
    """Return the metrics of some rows, the telling ones first, as far as a reader takes them in."""
    seen: Counter[str] = Counter()
    ranked = []
    for row in rows:
        _, base = kind_and_metric(row["metric"])
        place = _TELLING.index(base) if base in _TELLING else len(_TELLING)
        ranked.append((place == len(_TELLING), seen[base], place, row))  # one of each metric first
        seen[base] += 1
    ranked.sort(key=lambda entry: entry[:3])
    more = len(rows) - _MOST
    rest = f", and {more} more metric{'s' * (more > 1)}" if more > 0 else ""
    return ", ".join(told(row) for *_, row in ranked[:_MOST]) + rest


def _told(row: dict[str, Any]) -> str:
    return (
        f"{row['metric']} ({row['paired_difference']:+z.3f} [{row['paired_low']:+z.3f}, {row['paired_high']:+z.3f}], "
        f"p {'< 0.001' if row['p_corrected'] < 0.001 else format(row['p_corrected'], '.2g')})"
    )


def explained(metrics: list[str]) -> dict[str, str]:
    """Return what each metric means, and which values are better."""
    better = {"higher": "higher is better", "lower": "lower is better", "": "neither is better"}
    return {name: f"{meaning(name)} ({better[metric_of(name).better]})" for name in metrics}
