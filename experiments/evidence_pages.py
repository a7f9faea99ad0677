"""Write what is shown of the results of the studies: pages, tables and figures.

    python -m experiments.evidence_pages

`experiments/results/STUDY.md` gets every arm with its intervals, and every seed; docs/evidence.md and docs/choosing.md
get tables, and docs/images the figures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from experiments import evidence_plots, evidence_tables
from experiments.evidence_metrics import TESTED, TITLES
from experiments.evidence_report import RESULTS

_PARTS = {"test": "Test rows", "dev": "Development rows", "curves": "Learning curves, at their end"}


_DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path in sorted(RESULTS.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.with_suffix(".md").write_text(page(path.stem, lines), encoding="utf-8")
    for name in ("evidence", "choosing"):
        evidence_tables.write(_DOCS / f"{name}.md")
    evidence_plots.draw(_DOCS / "images")


def page(study: str, lines: list[dict[str, Any]]) -> str:
    """Return the page of a study.

    Args:
        lines: A line per run, as `evidence_report.write_run` writes them.
    """
    text = [
        f"# {study}",
        "",
        f"Written by `python -m experiments.evidence_pages` from `{study}.jsonl`. The settings are in",
    ]
    text += ["`../evidence.yaml`; [evidence.md](../../docs/evidence.md) says what follows.", ""]
    for part, title in _PARTS.items():
        of_part = [line for line in lines if line["part"] == part]
        if not of_part:
            continue
        metrics = [name for name in TITLES if any(name in line["metrics"] for line in of_part)]
        text += [f"## {title}", ""]
        compared = RESULTS / f"{study}-{part}.json"
        if compared.exists():
            text += _comparison(json.loads(compared.read_text(encoding="utf-8")))
        text += _seeds(of_part, metrics)
    return "\n".join(text)


def _comparison(rows: list[dict[str, Any]]) -> list[str]:
    """Return tables of the means, and of the differences to each baseline that are sure, bold."""
    text, metrics = [], [name for name in TESTED if any(row["metric"] == name for row in rows)]
    for baseline in dict.fromkeys(row["baseline"] for row in rows):
        of_baseline = {(row["method"], row["metric"]): row for row in rows if row["baseline"] == baseline}
        arms = dict.fromkeys(arm for arm, _ in of_baseline)
        text += [f"Differences to `{baseline}` [95 % interval over seeds and rows]; bold if they are sure (Holm):", ""]
        text += [f"| metric | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
        for metric in metrics:
            cells = [_cell(of_baseline.get((arm, metric))) for arm in arms]
            text.append(f"| {metric} | {' | '.join(cells)} |")
        text.append("")
    return text


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["paired_difference"] is None:
        return f"{row['mean']:.3f}"
    text = f"{row['paired_difference']:+.3f} [{row['paired_low']:+.3f}, {row['paired_high']:+.3f}]"
    return f"**{text}**" if row["verdict"] in ("better", "worse", "differs") else text


def _seeds(lines: list[dict[str, Any]], metrics: list[str]) -> list[str]:
    text = ["Every run:", "", f"| arm | seed | steps | operations | {' | '.join(metrics)} |"]
    text.append("|---" * (len(metrics) + 4) + "|")
    for line in lines:
        cells = [format(line["metrics"][name], ".3f") if name in line["metrics"] else "" for name in metrics]
        text.append(
            f"| {line['arm']} | {line['seed']} | {line['steps']:.0f} | {line['flops']:.3g} | {' | '.join(cells)} |"
        )
    return [*text, ""]


if __name__ == "__main__":
    main()
