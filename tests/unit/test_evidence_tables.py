"""The tables of docs/evidence.md are those of the results, and are written into the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import evidence_results, evidence_tables


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_results, "RESULTS", tmp_path)
    runs = {"sft": (0.25, 0.5, 0.3), "bash": (0.75, 1.0, 0.8), "rac": (0.1, 0.35, 0.15)}
    lines = [
        {"part": "test", "arm": arm, "seed": seed, "metrics": {"exact_match": value, "chrf": 1.0, "loss": 0.1}}
        | {"flops": 90.0 if arm == "bash" else 100.0}
        for arm, values in runs.items()
        for seed, value in enumerate(values)
    ]
    lines.append(lines[0] | {"part": "dev", "metrics": {"exact_match": 0.9}})
    (tmp_path / "sort.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_table_has_the_means_of_a_part_and_says_what_is_surely_better_or_worse_than_sft(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    head = evidence_tables._HEAD.format(study="sort", part="test")
    page.write_text(f"Before.\n\n{head}\nold\n<!-- end -->\n\nAfter.\n")
    evidence_tables.write(page)
    wanted = [
        head,
        "| | greedy answers | loss | operations | seeds |",
        "|---|---|---|---|---|",
        "| sft | 0.350 | 0.100 | 1.00 | 3 |",
        "| bash | 0.850↑ | 0.100 | 0.90 | 3 |",
        "| rac | 0.200↓ | 0.100 | 1.00 | 3 |",
        "<!-- end -->",
    ]
    assert page.read_text().splitlines() == ["Before.", "", *wanted, "", "After."]
    evidence_tables.write(page)
    assert page.read_text().splitlines() == ["Before.", "", *wanted, "", "After."]
