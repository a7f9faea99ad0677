"""The figures of the studies are drawn from their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import evidence_plots, evidence_results


def test_a_study_has_a_figure_of_its_arms_and_one_of_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_results, "RESULTS", tmp_path)
    metrics = {"exact_match": 0.5, "recovery_4": 0.25, "chrf": 1.0}
    lines: list[dict[str, Any]] = [
        {"part": "test", "arm": arm, "seed": seed, "metrics": metrics} for arm in ("sft", "bash") for seed in (0, 1)
    ]
    points = [{"step": step, "flops": 100.0 * step, "recovery_4": 0.1 * step, "loss": 1 / step} for step in (1, 2)]
    lines += [
        {"part": "curves", "arm": f"{method}-curve", "seed": 0, "metrics": metrics, "curve": points}
        for method in ("sft", "scheduled_sampling")
    ]
    (tmp_path / "sort.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evidence_plots.draw(tmp_path)
    for name in ("evidence-sort.png", "curves-sort.png"):
        assert (tmp_path / name).stat().st_size > 10_000, name
