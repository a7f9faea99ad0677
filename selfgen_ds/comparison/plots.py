"""The figures of a comparison: each is drawn into the report by itself, and all together into `comparison.png`."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from selfgen_ds.comparison.runs import Group
from selfgen_ds.evaluation.curves import binned
from selfgen_ds.evaluation.metrics import kind_and_metric, metric_of
from selfgen_ds.evaluation.plots import legend_below, plot_curve
from selfgen_ds.files import naming

Row = dict[str, Any]
_COLUMNS = 3
_QUALITY = ("final_answer", "exact_match", "rouge_l", "chrf", "free_running_accuracy")
"""Metrics of which the first that is not 0 for all groups stands for the quality of answers."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure."""

    title: str
    caption: str
    draw: Callable[[Axes], None]


def figures(groups: list[Group], rows: list[Row]) -> list[Figure]:
    """Return the figures that the evaluations have data for."""
    by_name = {(row["run"], row["metric"]): row for row in rows}
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    quality = main_metric(rows)
    found = [
        Figure(
            title="Greedy answers",
            caption="Means with 95 % intervals of the metrics between 0 and 1.",
            draw=lambda axes: _plot_means(axes, groups, by_name, _shares(metrics)),
        ),
        Figure(
            title="The gap by position",
            caption="Accuracy given the reference (dashed) and given the model's own answer (solid), by position.",
            draw=lambda axes: _plot_gap(axes, groups),
        ),
    ]
    if all(any(p["recovery"] for run in group.predictions for p in run) for group in groups):
        caption = "Accuracy of the tokens after a forced wrong one."
        found.append(Figure(title="Recovery", caption=caption, draw=lambda axes: _plot_recovery(axes, groups)))
    if sampled := [name for name in metrics if name.startswith("sampled_")]:
        base = kind_and_metric(quality)[1]
        caption = f"Sampled answers by temperature (greedy at 0): {base.replace('_', ' ')}."
        found.append(
            Figure(
                title="The price at higher temperatures",
                caption=caption,
                draw=lambda axes: _plot_kinds(axes, groups, by_name, sampled, base),
            )
        )
    if all(group.cost is not None for group in groups):
        caption = f"{quality.replace('_', ' ')} against the operations of training, passes and rounds counted in."
        found.append(
            Figure(
                title="Score against compute",
                caption=caption,
                draw=lambda axes: _plot_compute(axes, groups, by_name, quality),
            )
        )
    return found


def main_metric(rows: Sequence[Row]) -> str:
    """Return the metric that stands for the quality of greedy answers: the first that is not 0 everywhere."""
    for name in _QUALITY:
        values = {row["mean"] for row in rows if row["metric"] == name}
        if values and values != {0.0}:
            return name
    return rows[0]["metric"]


def write_all(path: Path, title: str, drawn: list[Figure]) -> None:
    """Write all figures into one PNG."""
    columns = min(_COLUMNS, len(drawn))
    lines = math.ceil(len(drawn) / columns)
    size = (5 * columns, 4 * lines + 0.6)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for one, panel in zip(drawn, axes.flat, strict=False):
        one.draw(panel)
        panel.set_title(one.title, fontsize=9)
    for panel in list(axes.flat)[len(drawn) :]:
        panel.axis("off")
    figure.suptitle(title, fontsize=9)
    legend_below(figure, axes.flat)
    with naming(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def as_data_url(one: Figure) -> str:
    """Return a figure as a `data:` URL of a PNG, which a page can hold."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    one.draw(axes)
    legend_below(figure, [axes])
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _shares(metrics: list[str]) -> list[str]:
    greedy = [name for name in metrics if not kind_and_metric(name)[0]]
    return [name for name in greedy if metric_of(name).scale == 1]


def _plot_means(axes: Axes, groups: list[Group], by_name: dict[tuple[str, str], Row], metrics: list[str]) -> None:
    """Draw the mean of every metric as a point per group, with its interval."""
    for number, group in enumerate(groups):
        rows = [by_name[group.name, metric] for metric in metrics]
        means = np.array([row["mean"] for row in rows])
        spread = np.abs(np.array([[row["low"], row["high"]] for row in rows]).T - means)
        at = np.arange(len(metrics)) + (number + 1) / (len(groups) + 1) - 0.5
        axes.errorbar(means, at, xerr=spread, fmt="o", markersize=4, capsize=2, label=group.label)
    axes.set_yticks(np.arange(len(metrics)), [name.replace("_", " ") for name in metrics], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlabel="mean, 95 % interval", xlim=(-0.02, 1.02))


def _plot_gap(axes: Axes, groups: list[Group]) -> None:
    for group in groups:
        predictions = [prediction for run in group.predictions for prediction in run]
        free, forced = (binned([p[name] for p in predictions]) for name in ("free_running", "teacher_forced"))
        plot_curve(axes, free, group.label)
        axes.plot(forced.positions, forced.mean, linestyle="--", color=axes.lines[-1].get_color())
    axes.set(xlabel="position in the answer", ylabel="accuracy", ylim=(-0.02, 1.02))


def _plot_recovery(axes: Axes, groups: list[Group]) -> None:
    for group in groups:
        flags = [flags for run in group.predictions for prediction in run for flags in prediction["recovery"]]
        plot_curve(axes, binned(flags), group.label)
    axes.set(xlabel="tokens after the forced error", ylabel="accuracy", ylim=(-0.02, 1.02))


def _plot_kinds(
    axes: Axes, groups: list[Group], by_name: dict[tuple[str, str], Row], names: list[str], base: str
) -> None:
    """Draw a metric of sampled answers by temperature; the greedy answers stand at 0."""
    kinds = dict.fromkeys(kind for kind, _ in map(kind_and_metric, names))
    of_sampled = "accuracy" if base == "free_running_accuracy" else base
    for group in groups:
        points = [(float(kind.split("_")[1]), by_name.get((group.name, f"{kind}_{of_sampled}"))) for kind in kinds]
        points.append((0.0, by_name.get((group.name, base))))
        known = sorted((t, row["mean"], row["low"], row["high"]) for t, row in points if row is not None)
        temperature, means, low, high = np.array(known).T
        axes.errorbar(
            temperature, means, yerr=np.abs([means - low, high - means]), marker="o", capsize=2, label=group.label
        )
    axes.set(xlabel="temperature", ylabel=base.replace("_", " "))


def _plot_compute(axes: Axes, groups: list[Group], by_name: dict[tuple[str, str], Row], metric: str) -> None:
    for group in groups:
        row = by_name[group.name, metric]
        assert group.cost is not None
        spread = np.abs([[row["mean"] - row["low"]], [row["high"] - row["mean"]]])
        axes.errorbar([group.cost.flops], [row["mean"]], yerr=spread, marker="o", capsize=3, label=group.label)
    axes.set(xlabel="floating-point operations of training", ylabel=metric.replace("_", " "))
