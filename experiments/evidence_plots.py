"""The figures of docs/choosing.md, from `experiments/results/`.

python -m experiments.evidence_plots docs/images
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments.evidence_report import RESULTS

_COLORS = {"sft": "#555555", "scheduled_sampling": "#1f77b4"}
_CURVES = ("sampled_2_accuracy", "sampled_1_exact_match", "recovery_4", "loss")


def main(folder: str) -> None:
    for path in sorted(RESULTS.glob("*-test.json")):
        differences(path, Path(folder) / f"evidence-{path.stem.removesuffix('-test')}.png")
    for path in sorted(RESULTS.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if curves := [line for line in lines if line["part"] == "curves"]:
            learning_curves(path.stem, curves, Path(folder) / f"curves-{path.stem}.png")


def differences(path: Path, image: Path) -> None:
    """Draw the differences of all arms to sft in some metrics, with their intervals over seeds and rows."""
    rows = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["baseline"] == "sft"]
    present = {row["metric"] for row in rows}
    wished = (
        "exact_match",
        "sampled_1_exact_match",
        "sampled_2_accuracy",
        "rouge_l",
        "sampled_1_rouge_l",
        "recovery_4",
    )
    metrics = [name for name in wished if name in present]
    figure, panels = plt.subplots(1, len(metrics), figsize=(2.6 * len(metrics) + 1.5, 3.6), sharey=True, squeeze=False)
    for axes, metric in zip(panels[0], metrics, strict=True):
        of_metric = [row for row in rows if row["metric"] == metric and row["paired_difference"] is not None]
        for place, row in enumerate(reversed(of_metric)):
            color = {"better": "#2a8f4f", "worse": "#c0392b"}.get(row["verdict"], "#777777")
            axes.plot([row["paired_low"], row["paired_high"]], [place, place], color=color)
            axes.plot([row["paired_difference"]], [place], "o", color=color, markersize=4)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(of_metric)), [row["method"] for row in reversed(of_metric)], fontsize=8)
        axes.set_title(metric, fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
    figure.supxlabel("difference to sft at its budget (green: better, red: worse)", fontsize=8)
    _save(figure, image)


def learning_curves(study: str, lines: list[dict[str, Any]], image: Path) -> None:
    """Draw metrics over the operations for sft and the mixture: a thin line per seed, and the mean."""
    metrics = [name for name in _CURVES if name in lines[0]["curve"][0]]
    figure, panels = plt.subplots(1, len(metrics), figsize=(3 * len(metrics), 3), squeeze=False)
    for axes, metric in zip(panels[0], metrics, strict=True):
        for method, color in _COLORS.items():
            of_method = [line["curve"] for line in lines if line["arm"] == f"{method}-curve"]
            _plot(axes, of_method, metric, color, method)
        axes.set_title(metric, fontsize=9)
        axes.tick_params(labelsize=7)
        if metric == "loss":
            axes.set_yscale("log")
    panels[0][0].legend(fontsize=7)
    figure.supxlabel(f"{study}: floating-point operations after the warm-up", fontsize=8)
    _save(figure, image)


def _plot(axes: Axes, curves: list[list[dict[str, float]]], metric: str, color: str, label: str) -> None:
    for curve in curves:
        axes.plot([point["flops"] for point in curve], [point[metric] for point in curve], color=color, alpha=0.25)
    together = np.mean([[point[metric] for point in curve] for curve in curves], axis=0)
    axes.plot([point["flops"] for point in curves[0]], together, color=color, label=label)


def _save(figure: Any, image: Path) -> None:
    figure.tight_layout()
    figure.savefig(image, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
