"""The figures of docs/evidence.md and docs/choosing.md, from `experiments/results/`; `evidence_pages.py` draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments import evidence_results
from experiments.evidence_comparison import Line, arms_of, differences
from experiments.evidence_metrics import METRICS, TITLES
from experiments.evidence_study import PLAN

_COLORS = {"sft": "#555555", "scheduled_sampling": "#1f77b4"}
_CURVES = ("sampled_2_accuracy", "sampled_1_exact_match", "recovery_4", "loss")


def draw(folder: Path) -> None:
    """Draw the figures of all studies into a folder."""
    for study in PLAN["studies"]:
        if tested := evidence_results.read(study, "test"):
            arms(tested, folder / f"evidence-{study}.png")
        if curves := evidence_results.read(study, "curves"):
            learning_curves(study, curves, folder / f"curves-{study}.png")


def arms(lines: list[Line], image: Path) -> None:
    """Draw a dot for each seed of each arm, and a line at the mean of sft, in some metrics."""
    found, names = differences(lines), arms_of(lines)
    metrics = [m.name for m in METRICS if m.drawn and any(line["metrics"].get(m.name) for line in lines)]
    figure, panels = plt.subplots(1, len(metrics), figsize=(2.2 * len(metrics) + 1.8, 3.8), sharey=True, squeeze=False)
    for axes, metric in zip(panels[0], metrics, strict=True):
        values = {
            arm: [line["metrics"][metric] for line in lines if line["arm"] == arm and metric in line["metrics"]]
            for arm in names
        }
        axes.axvline(float(np.mean(values["sft"])), color="#bbbbbb", linewidth=0.8)
        for place, arm in enumerate(reversed(names)):
            verdict = found[arm, metric].verdict if (arm, metric) in found else ""
            color = {"better": "#2a8f4f", "worse": "#c0392b"}.get(verdict, "#555555")
            axes.plot(values[arm], [place] * len(values[arm]), "o", color=color, alpha=0.6, markersize=4)
        axes.set_yticks(range(len(names)), names[::-1], fontsize=8)
        axes.set_title(TITLES[metric], fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
    figure.supxlabel(
        "a dot for each seed; grey line: mean of sft; green: surely better than sft, red: worse", fontsize=8
    )
    _save(figure, image)


def learning_curves(study: str, lines: list[Line], image: Path) -> None:
    """Draw metrics over the operations for sft and the mixture: a thin line per seed, and the mean."""
    metrics = [name for name in _CURVES if name in lines[0]["curve"][0]]
    figure, panels = plt.subplots(1, len(metrics), figsize=(3 * len(metrics), 3), squeeze=False)
    for axes, metric in zip(panels[0], metrics, strict=True):
        for method, color in _COLORS.items():
            of_method = [line["curve"] for line in lines if line["arm"] == f"{method}-curve"]
            _plot(axes, of_method, metric, color, method)
        axes.set_title(TITLES[metric], fontsize=9)
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
