"""The tables of docs/evidence.md and docs/choosing.md, from `experiments/results/`.

A table stands between the line of `_HEAD` and `<!-- end -->` of the page; `evidence_pages.py` has it written anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from experiments import evidence_results
from experiments.evidence_comparison import Line, arms_of, differences
from experiments.evidence_metrics import METRICS, TITLES

_HEAD = "<!-- Written by `python -m experiments.evidence_pages`: {study} {part} -->"
_BLOCK = re.compile(_HEAD.format(study=r"(\S+)", part=r"(\S+)") + r"\n.*?<!-- end -->\n", re.DOTALL)

_MIXTURES = {"scheduled_sampling 2": "plain", "scheduled_sampling 1": "ends with DFT"}
"""Method of the pilots of `pilot_check.py` -> what the table calls it."""


def write(page: Path) -> None:
    """Write the tables of a page anew."""
    text = page.read_text(encoding="utf-8")
    page.write_text(_BLOCK.sub(lambda found: _block(found[1], found[2]), text), encoding="utf-8")


def _block(study: str, part: str) -> str:
    shown = _pilots() if study == "pilot_check" else table(evidence_results.read(study, part))
    return f"{_HEAD.format(study=study, part=part)}\n{shown}\n<!-- end -->\n"


def _pilots() -> str:
    """Return what the pilots on built-in tasks said: a method per row, and a verdict per metric."""
    of_tasks: dict[str, list[dict[str, Any]]] = json.loads(
        (evidence_results.RESULTS / "pilot_check.json").read_text(encoding="utf-8")
    )
    metrics = list(dict.fromkeys(row["metric"] for rows in of_tasks.values() for row in rows))
    text = [f"| task, mixture | {' | '.join(TITLES[name] for name in metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for task, rows in of_tasks.items():
        for method, told in _MIXTURES.items():
            found = {row["metric"]: row for row in rows if row["method"] == method}
            text.append(f"| `{task}`, {told} | {' | '.join(_verdict(found[name]) for name in metrics)} |")
    return "\n".join(text)


def _verdict(row: dict[str, Any]) -> str:
    word = "" if row["verdict"] == "no difference shown" else f"**{row['verdict']}** "
    return f"{word}{row['difference']:+z.3f} [{row['low']:+z.3f}, {row['high']:+z.3f}]"


def table(lines: list[Line]) -> str:
    """Return the means of every arm, with an arrow where it is surely better (↑) or worse (↓) than sft, the first arm.

    The operations are relative to those of sft.

    Args:
        lines: The runs of one part of a study.
    """
    found, arms = differences(lines), arms_of(lines)
    known = [metric for metric in METRICS if metric.tabled and any(metric.name in line["metrics"] for line in lines)]
    # A quality that is 0 everywhere, such as exact matches of open text, says nothing.
    shown = [m for m in known if not m.drawn or any(line["metrics"].get(m.name) for line in lines)]
    text = [f"| | {' | '.join(metric.title for metric in shown)} | operations | seeds |"]
    text.append("|---" * (len(shown) + 3) + "|")
    sft = mean(line["flops"] for line in lines if line["arm"] == arms[0])
    for arm in arms:
        of_arm = [line for line in lines if line["arm"] == arm]
        cells = []
        for name in (metric.name for metric in shown):
            arrow = {"better": "↑", "worse": "↓"}.get(found[arm, name].verdict, "") if (arm, name) in found else ""
            values = [line["metrics"][name] for line in of_arm if name in line["metrics"]]
            cells.append(f"{mean(values):.3f}{arrow}" if values else "")
        operations = mean(line["flops"] for line in of_arm) / sft
        text.append(f"| {arm} | {' | '.join(cells)} | {operations:.2f} | {len(of_arm)} |")
    return "\n".join(text)
