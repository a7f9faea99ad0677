"""The figures of a comparison: each is drawn into the report by itself, and all together into `comparison.png`."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from selfgen_ds.comparison.runs import Group
from selfgen_ds.evaluation.curves import Curves
from selfgen_ds.evaluation.metrics import CALIBRATION_BINS, kind_and_metric, metric_of
from selfgen_ds.evaluation.plots import legend_below, plot_curve, plot_excess_error
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
    table = _Table(groups=groups, by_name={(row["run"], row["metric"]): row for row in rows})
    metrics, quality = list(dict.fromkeys(row["metric"] for row in rows)), main_metric(rows)
    means = Figure(
        title="Greedy answers",
        caption="Means with 95 % intervals of the metrics between 0 and 1.",
        draw=lambda axes: _plot_means(axes, table, _shares(metrics)),
    )
    found = [means, *_of_positions(groups), *_of_kinds(table, quality)]
    if all("calibration_error" in group.metrics for group in groups):
        caption = "How often the most probable token is right, by its probability, given the reference before it."
        found.append(Figure(title="Calibration", caption=caption, draw=lambda axes: _plot_calibration(axes, groups)))
    if all(group.cost is not None for group in groups):
        caption = f"{_words(quality)} against the operations of training, passes and rounds counted in."
        draw = partial(_plot_compute, table=table, metric=quality)
        found.append(Figure(title="Score against compute", caption=caption, draw=draw))
    return found


def _of_positions(groups: list[Group]) -> list[Figure]:
    """Return the figures of what the answers say by position."""
    curves = [(group.label, group.curves) for group in groups]
    found = [
        Figure(
            title="The gap by position",
            caption="Accuracy given the reference (dashed) and given the model's own answer (solid), by position.",
            draw=lambda axes: _plot_gap(axes, curves, "", "accuracy"),
        ),
        Figure(
            title="The gap in log-likelihood",
            caption="Log-likelihood of the reference given the reference (dashed) and the own answer (solid) before.",
            draw=lambda axes: _plot_gap(axes, curves, "_log_likelihood", "log-likelihood, nats"),
        ),
    ]
    if all("recovery" in of_group.by_name for _, of_group in curves):
        caption = (
            "Accuracy of the tokens after a forced wrong one: that of a built-in task, or else the model's own second "
            "choice, which is not the same token for every model."
        )
        found.append(Figure(title="Recovery", caption=caption, draw=lambda axes: _plot_recovery(axes, curves)))
    if all(of_group.excess_error() for _, of_group in curves):
        caption = "Divergence from the oracle after own tokens, beyond that after the reference's (ExAccErr)."
        found.append(Figure(title="Excess error", caption=caption, draw=lambda axes: _plot_excess(axes, curves)))
    return found


def _of_kinds(table: _Table, quality: str) -> list[Figure]:
    """Return the figures of sampled answers, and of answers under changed weights.

    Args:
        quality: The metric of greedy answers that stands for their quality.
    """
    of_sampled = "accuracy" if quality == "free_running_accuracy" else quality
    found = [
        (
            "After own slips",
            "Sampled answers with a slip: share of the next 4 tokens that are right.",
            table.sampled("after_slip_4"),
        ),
        (
            "The price of sampling",
            f"Sampled answers by temperature (greedy at 0): {_words(quality)}.",
            table.sampled(of_sampled, greedy=quality),
        ),
        (
            "The price of errors in the weights",
            f"Greedy answers of noisy and of rounded weights: {_words(quality)}.",
            table.changed_weights(quality),
        ),
    ]
    return [
        Figure(title=title, caption=caption, draw=partial(_plot_kinds, table=table, metrics=metrics))
        for title, caption, metrics in found
        if metrics
    ]


def _words(metric: str) -> str:
    return metric.replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The rows of the comparison, by group and metric."""

    groups: list[Group]
    by_name: dict[tuple[str, str], Row]

    def row(self, group: Group, metric: str) -> Row:
        return self.by_name[group.name, metric]

    def _kinds(self, base: str) -> dict[str, str]:
        """Return the kinds of answers that have a metric, with its name there."""
        names = dict.fromkeys(name for _, name in self.by_name)
        return {kind: name for name in names for kind, metric in [kind_and_metric(name)] if kind and metric == base}

    def sampled(self, base: str, greedy: str = "") -> dict[Any, str]:
        """Return the temperatures of sampled answers, with the name of a metric at each.

        Args:
            greedy: The same metric of greedy answers, which stand at 0; empty if there is none.
        """
        found = {float(k.removeprefix("sampled_")): n for k, n in self._kinds(base).items() if k.startswith("sampled_")}
        return dict(sorted(((({0.0: greedy} if greedy else {}) | found) if found else {}).items()))

    def changed_weights(self, base: str) -> dict[Any, str]:
        """Return the changes of weights, with the name of a metric for each; the weights as they are come first."""
        kinds = {k.replace("_", " "): n for k, n in self._kinds(base).items() if k.startswith(("noise_", "int"))}
        return {"none": base, **kinds} if kinds else {}


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


def _plot_means(axes: Axes, table: _Table, metrics: list[str]) -> None:
    """Draw the mean of every metric as a point per group, with its interval."""
    for number, group in enumerate(table.groups):
        rows = [table.row(group, metric) for metric in metrics]
        means = np.array([row["mean"] for row in rows])
        spread = np.abs(np.array([[row["low"], row["high"]] for row in rows]).T - means)
        at = np.arange(len(metrics)) + (number + 1) / (len(table.groups) + 1) - 0.5
        axes.errorbar(means, at, xerr=spread, fmt="o", markersize=4, capsize=2, label=group.label)
    axes.set_yticks(np.arange(len(metrics)), [name.replace("_", " ") for name in metrics], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlabel="mean, 95 % interval", xlim=(-0.02, 1.02))


def _limits(metric: str) -> dict[str, Any]:
    """Return the limits of the axis of a metric: none for one that is no share."""
    return {"ylim": (-0.02, 1.02)} if metric_of(metric).scale == 1 else {}


def _plot_gap(axes: Axes, curves: list[tuple[str, Curves]], what: str, told: str) -> None:
    for label, of_group in curves:
        free, forced = (of_group.by_name[f"{how}{what}"].binned() for how in ("free_running", "teacher_forced"))
        plot_curve(axes, free, label)
        axes.plot(forced.positions, forced.mean, linestyle="--", color=axes.lines[-1].get_color())
    axes.set(xlabel="position in the answer", ylabel=told, **({} if what else {"ylim": (-0.02, 1.02)}))


def _plot_recovery(axes: Axes, curves: list[tuple[str, Curves]]) -> None:
    for label, of_group in curves:
        plot_curve(axes, of_group.by_name["recovery"].binned(), label)
    axes.set(xlabel="tokens after the forced error", ylabel="accuracy", ylim=(-0.02, 1.02))


def _plot_excess(axes: Axes, curves: list[tuple[str, Curves]]) -> None:
    for label, of_group in curves:
        plot_excess_error(axes, of_group.excess_error(), label)


def _plot_kinds(axes: Axes, table: _Table, metrics: dict[Any, str]) -> None:
    """Draw a metric of several kinds of answers.

    Args:
        metrics: Temperature or change of the weights -> name of the metric.
    """
    for group in table.groups:
        rows = [table.row(group, name) for name in metrics.values()]
        means, low, high = (np.array([row[name] for row in rows]) for name in ("mean", "low", "high"))
        spread = np.abs([means - low, high - means])
        axes.errorbar([*metrics], means, yerr=spread, marker="o", capsize=2, label=group.label)
    along, last = "change of the weights" if "none" in metrics else "temperature", [*metrics.values()][-1]
    axes.set(xlabel=along, ylabel=_words(kind_and_metric(last)[1]), **_limits(last))


def _plot_calibration(axes: Axes, groups: list[Group]) -> None:
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    for group in groups:
        sums = group.sample("calibration_error").statistics.sum(axis=(0, 1)).reshape(CALIBRATION_BINS, 3)
        tokens, confidence, right = sums[sums[:, 0] > 0].T
        axes.plot(confidence / tokens, right / tokens, marker="o", markersize=3, label=group.label)
    axes.set(xlabel="probability of the most probable token", ylabel="share of these tokens that are right")


def _plot_compute(axes: Axes, table: _Table, metric: str) -> None:
    for group in table.groups:
        row = table.row(group, metric)
        assert group.cost is not None
        spread = np.abs([[row["mean"] - row["low"]], [row["high"] - row["mean"]]])
        axes.errorbar([group.cost.flops], [row["mean"]], yerr=spread, marker="o", capsize=3, label=group.label)
    axes.set(xlabel="floating-point operations of training", ylabel=_words(metric), **_limits(metric))
