"""The tables of docs/choosing.md, from `experiments/results/`: an arm per row, with its means over the seeds.

    python -m experiments.evidence_tables docs/choosing.md

A table stands between the lines `<!-- STUDY PART -->` and `<!-- end -->` of the page, and is written anew.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.evidence_report import RESULTS

COLUMNS = {
    "final_answer": "final answer",
    "exact_match": "greedy answers",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "realized_slots": "slots",
    "follows": "follows from its first letter",
    "sampled_1_follows": "the same at T 1",
    "sampled_1_exact_match": "whole answers at T 1",
    "sampled_1_rouge_l": "ROUGE-L at T 1",
    "sampled_1_realized_slots": "slots at T 1",
    "sampled_2_exact_match": "whole answers at T 2",
    "sampled_2_accuracy": "tokens at T 2",
    "sampled_2_after_slip_last": "own slips mended",
    "recovery_4": "after a forced error",
    "loss": "loss",
    "differing_share": "drawn tokens that differ",
}
"""Metrics of the tables, of those that a study has, with what the page calls them."""
_BLOCK = re.compile(r"<!-- (\S+) (\S+) -->\n.*?<!-- end -->\n", re.DOTALL)


def main(page: str) -> None:
    text = Path(page).read_text(encoding="utf-8")
    Path(page).write_text(_BLOCK.sub(lambda found: _block(found[1], found[2]), text), encoding="utf-8")


def _block(study: str, part: str) -> str:
    lines = [json.loads(line) for line in (RESULTS / f"{study}.jsonl").read_text(encoding="utf-8").splitlines()]
    differences = json.loads((RESULTS / f"{study}-{part}.json").read_text(encoding="utf-8"))
    shown = table([line for line in lines if line["part"] == part], differences)
    return f"<!-- {study} {part} -->\n{shown}\n<!-- end -->\n"


def table(lines: list[dict[str, Any]], differences: list[dict[str, Any]]) -> str:
    """Return the means of every arm, with an arrow where it is surely better (↑) or worse (↓) than sft.

    Args:
        lines: A line per run, as `evidence_report.write_run` writes them.
        differences: What `evidence_report.write_comparison` returns.
    """
    verdicts = {(row["method"], row["metric"]): row["verdict"] for row in differences if row["baseline"] == "sft"}
    arms = [arm for arm in dict.fromkeys(arm for arm, _ in verdicts) if any(line["arm"] == arm for line in lines)]
    names = [name for name in COLUMNS if any(name in line["metrics"] for line in lines)]
    text = [f"| | {' | '.join(COLUMNS[name] for name in names)} | seeds |", "|---" * (len(names) + 2) + "|"]
    for arm in arms:
        of_arm = [line["metrics"] for line in lines if line["arm"] == arm]
        cells = []
        for name in names:
            arrow = {"better": "↑", "worse": "↓"}.get(verdicts.get((arm, name), ""), "")
            values = [metrics[name] for metrics in of_arm if name in metrics]
            cells.append(f"{mean(values):.3f}{arrow}" if values else "")
        text.append(f"| {arm} | {' | '.join(cells)} | {len(of_arm)} |")
    return "\n".join(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
