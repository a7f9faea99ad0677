"""The plot of `selfgen-ds evaluate`: where an answer goes wrong, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfgen_ds.evaluation.curves import (
    ACCURACIES,
    ERROR_SHARES,
    LOG_LIKELIHOODS,
    Curve,
    Curves,
    PositionSums,
    accuracy_by_errors,
)
from selfgen_ds.evaluation.metrics import SampleScore, kind_and_metric
from selfgen_ds.files import naming

_CHARACTERS_PER_INCH = 15  # of the legend's font


def plot_evaluation(path: Path, title: str, scores: list[SampleScore], metrics: dict[str, float]) -> None:
    """Write a PNG with the accuracy and the log-likelihood by position, and with what else was asked for.

    Args:
        metrics: Name -> value over all rows.
    """
    curves = Curves(scores)
    rounds = [name for name in metrics if name.startswith("corrected_") and name.endswith("_exact_match")]
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _plot_accuracies(axes, curves.by_name),
        lambda axes: _plot_log_likelihoods(axes, curves.by_name),
    ]
    if not all(all(score.free_running) for score in scores):
        panels.append(lambda axes: _plot_errors(axes, scores))
    if excess := curves.excess_error():
        panels.append(lambda axes: plot_excess_error(axes, excess, ""))
    if any(name.startswith("sampled_") for name in metrics):
        panels.append(lambda axes: _plot_temperatures(axes, metrics))
    if rounds:
        panels.append(lambda axes: _plot_corrections(axes, metrics, len(rounds)))
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 4 * len(panels), 4), layout="constrained", squeeze=False)
    for panel, plot in zip(axes[0], panels, strict=True):
        plot(panel)
    figure.suptitle(title, fontsize=9)
    legend_below(figure, axes[0])
    with naming(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_curve(axes: Axes, curve: Curve, label: str) -> None:
    """Draw means by position with their 95 % intervals."""
    (line,) = axes.plot(curve.positions, curve.mean, marker="o", markersize=3, label=label)
    axes.fill_between(curve.positions, curve.low, curve.high, color=line.get_color(), alpha=0.2, linewidth=0)


def legend_below(figure: Figure, axes: Iterable[Axes]) -> None:
    """Put one legend of all panels below them, where it hides nothing."""
    handles = {
        label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if not handles:
        return
    widest = max(map(len, handles)) + 8  # the handle beside a label takes the room of some characters
    fitting = int(figure.get_figwidth() * _CHARACTERS_PER_INCH / widest)
    columns = max(1, min(4, fitting, len(handles)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def plot_excess_error(axes: Axes, excess: list[float], label: str) -> None:
    """Draw ExAccErr up to every position; empty without an oracle."""
    axes.plot(range(1, len(excess) + 1), excess, label=label)
    axes.axhline(0.0, color="0.7", linewidth=0.8)
    axes.set(xlabel="length of the answer", ylabel="excess accumulated error (ExAccErr), %")


def _plot_accuracies(axes: Axes, curves: dict[str, PositionSums]) -> None:
    for name in ACCURACIES:
        if name in curves:
            plot_curve(axes, curves[name].binned(), name.replace("_", " "))
    recovers = "\n(recovery: after the forced error)" if "recovery" in curves else ""
    axes.set(xlabel=f"position in the answer{recovers}", ylabel="accuracy", ylim=(-0.02, 1.02))


def _plot_log_likelihoods(axes: Axes, curves: dict[str, PositionSums]) -> None:
    for name in LOG_LIKELIHOODS:
        plot_curve(axes, curves[name].binned(), name.removesuffix("_log_likelihood").replace("_", " "))
    axes.set(xlabel="position in the answer", ylabel="log-likelihood of the reference, nats")


def _plot_errors(axes: Axes, scores: list[SampleScore]) -> None:
    """Draw the accuracy of the next token by the share of errors before it, for each quarter of the positions."""
    rows = [row for row in accuracy_by_errors(scores) if row["tokens"] >= 10]
    for first, last in dict.fromkeys((row["from_position"], row["to_position"]) for row in rows):
        part = [row for row in rows if row["from_position"] == first]
        at = [ERROR_SHARES.index(row["most_errors"]) for row in part]
        axes.plot(at, [row["accuracy"] for row in part], marker="o", label=f"tokens {first:.0f} to {last:.0f}")
    axes.set_xticks(range(len(ERROR_SHARES)), ["none", *(f"≤ {share:.0%}" for share in ERROR_SHARES[1:])])
    axes.set(xlabel="own errors before the token", ylabel="free-running accuracy", ylim=(-0.02, 1.02))


def _plot_temperatures(axes: Axes, metrics: dict[str, float]) -> None:
    """Draw the sampled quality by temperature; the greedy answers stand at 0."""
    for base in ("exact_match", "final_answer", "last_token", "accuracy"):
        points = [(float(kind.removeprefix("sampled_")), metrics[f"{kind}_{base}"]) for kind in _sampled(metrics, base)]
        greedy = metrics.get("free_running_accuracy" if base == "accuracy" else base)
        points += [] if greedy is None or not points else [(0.0, greedy)]
        axes.plot(
            *zip(*sorted(points), strict=True), marker="o", label=f"sampled: {base.replace('_', ' ')}"
        ) if points else None
    axes.set(xlabel="temperature", ylabel="share of answers or tokens", ylim=(-0.02, 1.02))


def _sampled(metrics: dict[str, float], base: str) -> list[str]:
    kinds = [kind_and_metric(name) for name in metrics]
    return [kind for kind, metric in kinds if kind.startswith("sampled_") and metric == base]


def _plot_corrections(axes: Axes, metrics: dict[str, float], rounds: int) -> None:
    """Draw the exact match and the rates of change over the rounds of correction."""
    for base, line in {"exact_match": "-", "wrong_to_right": "--", "right_to_wrong": "--", "unchanged": ":"}.items():
        first = [metrics[base]] if base == "exact_match" else []
        values = [*first, *(metrics[f"corrected_{number}_{base}"] for number in range(1, rounds + 1))]
        axes.plot(range(rounds + 1)[-len(values) :], values, marker="o", linestyle=line, label=base.replace("_", " "))
    axes.set(xlabel="corrections", ylabel="share of rows", ylim=(-0.02, 1.02), xticks=range(rounds + 1))
