"""Write what is shown of the results of the studies: pages, tables and figures.

    python -m experiments.evidence_pages

`experiments/results/STUDY.md` gets every arm with its intervals, and every seed; docs/evidence.md and docs/choosing.md
get tables, and docs/images the figures.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from experiments import evidence_plots, evidence_results, evidence_tables
from experiments.evidence_comparison import Difference, Line, arms_of, differences
from experiments.evidence_metrics import TESTED, TITLES

_PARTS = {"test": "Test rows", "dev": "Development rows", "curves": "Learning curves, at their end"}
_BASELINES = ("sft", "noise")
_DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path in sorted(evidence_results.RESULTS.glob("*.jsonl")):
        path.with_suffix(".md").write_text(page(path.stem, evidence_results.read(path.stem)), encoding="utf-8")
    for name in ("evidence", "choosing"):
        evidence_tables.write(_DOCS / f"{name}.md")
    evidence_plots.draw(_DOCS / "images")


def page(study: str, lines: list[Line]) -> str:
    """Return the page of a study.

    Args:
        lines: A line per run, as `evidence_results.write` writes them.
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
        for baseline in _BASELINES:
            text += _comparison(baseline, differences(of_part, baseline))
        text += _seeds(of_part, metrics)
    return "\n".join(text)


def _comparison(baseline: str, found: dict[tuple[str, str], Difference]) -> list[str]:
    """Return a table of the differences to a baseline; nothing if there are none."""
    if not found:
        return []
    arms = list(dict.fromkeys(arm for arm, _ in found))
    text = [f"Differences to `{baseline}` [95 % interval over seeds]; bold if they are sure (Holm, for an arm):", ""]
    text += [f"| metric | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    for metric in TESTED:
        cells = [_cell(found.get((arm, metric))) for arm in arms]
        if any(cells):
            text.append(f"| {metric} | {' | '.join(cells)} |")
    return [*text, ""]


def _cell(one: Difference | None) -> str:
    if one is None:
        return ""
    if math.isnan(one.low):
        return f"{one.value:+.3f}"
    text = f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
    return f"**{text}**" if one.verdict else text


def _seeds(lines: list[Line], metrics: list[str]) -> list[str]:
    text = ["Every run:", "", f"| arm | seed | steps | operations | {' | '.join(metrics)} |"]
    text.append("|---" * (len(metrics) + 4) + "|")
    for line in sorted(lines, key=lambda line: (arms_of(lines).index(line["arm"]), line["seed"])):
        cells = [format(line["metrics"][name], ".3f") if name in line["metrics"] else "" for name in metrics]
        text.append(
            f"| {line['arm']} | {line['seed']} | {line['steps']:.0f} | {line['flops']:.3g} | {' | '.join(cells)} |"
        )
    return [*text, ""]


if __name__ == "__main__":
    main()
