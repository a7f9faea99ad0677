"""The plots of `selfgen-ds evaluate` and `selfgen-ds compare`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfgen_ds.evaluation.metrics import CORRECTION_METRICS, Curve, corrected
from selfgen_ds.files import naming

_CHARACTERS_PER_INCH = 15  # of the legend's font


def plot_evaluation(
    path: Path, title: str, curves: dict[str, Curve], metrics: dict[str, float], correction_rounds: int
) -> None:
    """Write a PNG with the accuracy by position and, if there are corrections, their effect round by round.

    Args:
        curves: Name -> accuracy by position.
        metrics: Name -> value over all rows.
    """
    panels = 1 + bool(correction_rounds)
    figure, axes = plt.subplots(1, panels, figsize=(2 + 5 * panels, 4), layout="constrained", squeeze=False)
    for name, curve in curves.items():
        _plot_curve(axes[0, 0], curve, name.replace("_", " "))
    recovers = " (recovery: after the forced error)" if any("recovery" in name for name in curves) else ""
    axes[0, 0].set(xlabel=f"position in the answer{recovers}", ylabel="accuracy", ylim=(-0.02, 1.02))
    if correction_rounds:
        _plot_corrections(axes[0, 1], metrics, correction_rounds)
    figure.suptitle(title, fontsize=9)
    _legend_below(figure, axes[0])
    with naming(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_curve(axes: Axes, curve: Curve, label: str) -> None:
    """Draw the accuracy by position with its 95 % interval."""
    (line,) = axes.plot(curve.positions, curve.mean, marker="o", markersize=3, label=label)
    axes.fill_between(curve.positions, curve.low, curve.high, color=line.get_color(), alpha=0.2, linewidth=0)


def _legend_below(figure: Figure, axes: Iterable[Axes]) -> None:
    """Put one legend of all panels below them, where it hides nothing."""
    handles = {
        label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    widest = max(map(len, handles), default=1) + 8  # the handle beside a label takes the room of some characters
    fitting = int(figure.get_figwidth() * _CHARACTERS_PER_INCH / widest)
    columns = max(1, min(4, fitting, len(handles)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def _plot_corrections(axes: Axes, metrics: dict[str, float], rounds: int) -> None:
    """Draw the exact match and the rates of change over the rounds of correction."""
    numbers = range(1, rounds + 1)
    for kind, line in zip(CORRECTION_METRICS, ("-", "--", "--", ":"), strict=True):
        first = [metrics["exact_match"]] if kind == "exact_match" else []
        values = [*first, *(metrics[corrected(number)[kind]] for number in numbers)]
        axes.plot(range(rounds + 1)[-len(values) :], values, marker="o", linestyle=line, label=kind.replace("_", " "))
    axes.set(xlabel="corrections", ylabel="share of rows", ylim=(-0.02, 1.02), xticks=range(rounds + 1))


def plot_comparison(
    path: Path, title: str, rows: list[dict[str, Any]], recovery: Mapping[str, Curve | None], correction_rounds: int
) -> None:
    """Write a PNG with the means and intervals of every run, its loss, and its curves of recovery and of corrections.

    The curves of recovery are left out if a run has none.

    Args:
        rows: Rows of `comparison.json`.
        recovery: Run -> accuracy after a forced error; None if the run was not evaluated on a task.
    """
    curves = {run: curve for run, curve in recovery.items() if curve is not None}
    with_recovery = len(curves) == len(recovery)
    panels = 2 + with_recovery + bool(correction_rounds)
    ratios = [3, 1, *[2] * (panels - 2)]
    figure, axes = plt.subplots(
        1, panels, figsize=(1 + 2 * sum(ratios), 4.5), layout="constrained", squeeze=False, width_ratios=ratios
    )
    row_of = {(row["run"], row["metric"]): row for row in rows}
    labels = {row["run"]: row["label"] for row in rows}
    metrics = [name for name in dict.fromkeys(row["metric"] for row in rows) if not name.startswith("corrected_")]
    _plot_bars(axes[0, 0], row_of, labels, [metric for metric in metrics if metric != "loss"])
    axes[0, 0].set(ylim=(0, 1.02))
    _plot_bars(axes[0, 1], row_of, labels, ["loss"])
    if with_recovery:
        for run, curve in curves.items():
            _plot_curve(axes[0, 2], curve, labels[run])
        axes[0, 2].set(xlabel="tokens after the forced error", ylabel="accuracy", ylim=(-0.02, 1.02))
    if correction_rounds:
        panel, numbers = axes[0, -1], range(correction_rounds + 1)
        names = ["exact_match", *(corrected(number)["exact_match"] for number in numbers[1:])]
        for run, label in labels.items():
            panel.plot(numbers, [row_of[run, name]["mean"] for name in names], marker="o", label=label)
        panel.set(xlabel="corrections", ylabel="exact match", ylim=(-0.02, 1.02), xticks=numbers)
    figure.suptitle(title, fontsize=9)
    _legend_below(figure, axes[0, :1])
    with naming(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_bars(
    axes: Axes, row_of: dict[tuple[str, str], dict[str, Any]], labels: dict[str, str], metrics: list[str]
) -> None:
    """Draw the mean of every metric as a bar per run, with the 95 % interval."""
    width = 0.8 / len(labels)
    for number, (run, label) in enumerate(labels.items()):
        values = [row_of[run, metric] for metric in metrics]
        means = np.array([value["mean"] for value in values])
        spread = np.abs(np.array([[value["low"], value["high"]] for value in values]).T - means)
        axes.bar(np.arange(len(metrics)) + number * width, means, width, yerr=spread, capsize=2, label=label)
    names = [metric.replace("_", "\n") for metric in metrics]
    axes.set_xticks(np.arange(len(metrics)) + 0.4 - width / 2, names, fontsize=7)
    axes.set(ylabel="mean, 95 % interval")
