"""The plots of `selfgen-ds evaluate` and `selfgen-ds compare`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from selfgen_ds.evaluation.metrics import CORRECTION_METRICS, corrected
from selfgen_ds.files import naming

_MOST_MARKED = 60  # positions of a curve; markers on a longer one would hide the line


def plot_evaluation(
    path: Path, title: str, curves: dict[str, list[float]], metrics: dict[str, float], correction_rounds: int
) -> None:
    """Write a PNG with the accuracy by position and, if there are corrections, their effect round by round.

    Args:
        curves: Name -> accuracy at each position, as `selfgen_ds.evaluation.metrics.curves` returns them.
        metrics: Name -> value over all rows.
    """
    panels = 1 + bool(correction_rounds)
    figure, axes = plt.subplots(1, panels, figsize=(2 + 5 * panels, 4), layout="constrained", squeeze=False)
    _plot_curves(axes[0, 0], title, curves)
    if correction_rounds:
        _plot_corrections(axes[0, 1], metrics, correction_rounds)
    with naming(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_curves(axes: Axes, title: str, curves: dict[str, list[float]]) -> None:
    for (name, values), line in zip(curves.items(), ("-", "--", ":"), strict=False):
        marker = "." if len(values) < _MOST_MARKED else ""
        axes.plot(range(1, len(values) + 1), values, marker=marker, linestyle=line, label=name.replace("_", " "))
    axes.set(xlabel="position in the answer (recovery: after the forced error)", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.set_title(title, fontsize=9)
    axes.legend()


def _plot_corrections(axes: Axes, metrics: dict[str, float], rounds: int) -> None:
    """Draw the exact match and the rates of change over the rounds of correction."""
    numbers = range(1, rounds + 1)
    for kind, line in zip(CORRECTION_METRICS, ("-", "--", "--", ":"), strict=True):
        first = [metrics["exact_match"]] if kind == "exact_match" else []
        values = [*first, *(metrics[corrected(number)[kind]] for number in numbers)]
        axes.plot(range(rounds + 1)[-len(values) :], values, marker="o", linestyle=line, label=kind.replace("_", " "))
    axes.set(xlabel="corrections", ylabel="share of rows", ylim=(-0.02, 1.02), xticks=range(rounds + 1))
    axes.legend()


def plot_comparison(
    path: Path, rows: list[dict[str, Any]], recovery: Mapping[str, list[float] | None], correction_rounds: int
) -> None:
    """Write a PNG with the means and intervals of every run, and its curves of recovery and of corrections.

    The curves of recovery are left out if a run has none.

    Args:
        rows: Rows of `comparison.json`.
        recovery: Run -> accuracy after a forced error by position; None if the run was not evaluated on a task.
    """
    with_recovery = None not in recovery.values()
    panels = 1 + with_recovery + bool(correction_rounds)
    figure, axes = plt.subplots(1, panels, figsize=(1 + 5 * panels, 4), layout="constrained", squeeze=False)
    row_of = {(row["run"], row["metric"]): row for row in rows}
    methods = {row["run"]: row["method"] for row in rows}
    metrics = [name for name in dict.fromkeys(row["metric"] for row in rows) if not name.startswith("corrected_")]
    _plot_bars(axes[0, 0], row_of, methods, metrics)
    if with_recovery:
        panel = axes[0, 1]
        for run, curve in recovery.items():
            values = curve or []
            panel.plot(range(1, len(values) + 1), values, marker="o", label=methods[run])
        panel.set(xlabel="tokens after the forced error", ylabel="accuracy", ylim=(-0.02, 1.02))
        panel.legend()
    if correction_rounds:
        panel, numbers = axes[0, -1], range(correction_rounds + 1)
        names = ["exact_match", *(corrected(number)["exact_match"] for number in numbers[1:])]
        for run, method in methods.items():
            panel.plot(numbers, [row_of[run, name]["mean"] for name in names], marker="o", label=method)
        panel.set(xlabel="corrections", ylabel="exact match", ylim=(-0.02, 1.02), xticks=numbers)
        panel.legend()
    with naming(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_bars(
    axes: Axes, row_of: dict[tuple[str, str], dict[str, Any]], methods: dict[str, str], metrics: list[str]
) -> None:
    """Draw the mean of every metric as a bar per run, with the 95 % interval."""
    width = 0.8 / len(methods)
    for number, (run, method) in enumerate(methods.items()):
        values = [row_of[run, metric] for metric in metrics]
        means = np.array([value["mean"] for value in values])
        spread = np.abs(np.array([[value["low"], value["high"]] for value in values]).T - means)
        axes.bar(np.arange(len(metrics)) + number * width, means, width, yerr=spread, capsize=2, label=method)
    labels = [metric.replace("_", "\n") for metric in metrics]
    axes.set_xticks(np.arange(len(metrics)) + 0.4 - width / 2, labels, fontsize=7)
    axes.set(ylabel="mean, 95 % interval", ylim=(0, 1.02))
    axes.legend()
