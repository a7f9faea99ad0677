"""Draw `demo.png`, the picture of the README, from the table of the demo in `docs/results.md`.

python docs/images/demo.py
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ANSWERS = {
    "free_running_accuracy": "tokens of\ngreedy answers",
    "sampled_2_accuracy": "tokens of answers\nat temperature 2",
    "recovery_4": "four tokens after\na forced error",
    "exact_match": "whole\ngreedy answers",
    "sampled_1_exact_match": "whole answers\nat temperature 1",
}
"""Metrics of the picture, and what is written below their bars."""


def main() -> None:
    table = (HERE.parent / "results.md").read_text(encoding="utf-8").split("## The demo")[1].split("## ")[0]
    cells = {row.split("`")[1]: row.split("|")[3:5] for row in table.splitlines() if row.startswith("| `")}
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for number, method in enumerate(("sft", "scheduled_sampling")):
        for place, metric in enumerate(ANSWERS):
            value, *interval = map(float, re.findall(r"\d\.\d+", cells[metric][number]))
            low, high = interval or (value, value)
            position = place + 0.4 * number
            axes.bar(
                *(position, value, 0.4),
                color=f"C{number}",
                label=method if place == 0 else None,
                yerr=[[value - low], [high - value]],
                capsize=3,
            )
            axes.annotate(f"{value:.3f}", (position, max(value, high) + 0.02), ha="center", fontsize=8)
    axes.set_xticks([place + 0.2 for place in range(len(ANSWERS))], list(ANSWERS.values()))
    axes.set(ylabel="share that is right, 95 % interval", ylim=(0, 1.12))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=2, loc="upper right", bbox_to_anchor=(1, 1.16), frameon=False)
    figure.savefig(HERE / "demo.png", dpi=120)


if __name__ == "__main__":
    main()
