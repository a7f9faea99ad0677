"""The results of studies: a line per run, which a second run replaces, and pages that show every seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import evidence_pages, evidence_results
from selfgen_ds.pilot.runs import Arm, StudyRun


def _run(folder: Path, arm: str, seed: int, exact_match: float) -> StudyRun:
    own = folder / f"{arm}-{seed}"
    own.mkdir(exist_ok=True)
    run = StudyRun(arm=Arm(name=arm, settings={}), seed=seed, folder=own, recipe="demo", steps=2, evaluation={})
    metrics = {"exact_match": exact_match, "loss": 0.1234567, "chrf": 1.0}
    (run.folder / "evaluation.json").write_text(json.dumps({"metrics": metrics}))
    steps = [
        {"step": step, "tokens": 4, "no_grad_tokens": 0, "flops": 100.0, "step_time_s": 1.0}
        | {"drawn_tokens": 3 * step - 3, "differing_share": 0.5}
        for step in (1, 2)
    ]
    steps[1] |= {"eval_loss": 0.5, "eval_chrf": 2.0}
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return run


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_results, "RESULTS", tmp_path / "results")


def test_each_run_has_one_line_whose_last_result_counts(tmp_path: Path) -> None:
    for arm, seed, value in (("sft", 1, 0.5), ("sft", 0, 0.25), ("bash", 0, 0.75), ("sft", 1, 1.0)):
        evidence_results.write(_run(tmp_path, arm, seed, value), {"steps": 2}, "sort", "test")
    lines = [json.loads(line) for line in (tmp_path / "results" / "sort.jsonl").read_text().splitlines()]
    found = [(line["arm"], line["seed"], line["metrics"]["exact_match"]) for line in lines]
    assert found == [("bash", 0, 0.75), ("sft", 0, 0.25), ("sft", 1, 1.0)]
    assert lines[0]["metrics"] == {"exact_match": 0.75, "loss": 0.12346, "differing_share": 0.5}
    assert (lines[0]["steps"], lines[0]["flops"], lines[0]["settings"]) == (2, 200.0, {"steps": 2})
    assert evidence_results.read("sort", "test") == lines
    assert evidence_results.read("sort", "dev") == []


def test_a_curve_has_the_evaluations_with_the_operations_until_then(tmp_path: Path) -> None:
    evidence_results.write(_run(tmp_path, "sft-curve", 0, 0.5), {}, "sort", "curves")
    (line,) = (json.loads(line) for line in (tmp_path / "results" / "sort.jsonl").read_text().splitlines())
    assert line["curve"] == [{"step": 2, "flops": 200.0, "loss": 0.5}]


def test_a_page_shows_every_seed_and_marks_what_is_sure() -> None:
    lines = [
        {"part": "test", "arm": arm, "seed": seed, "steps": 2.0, "flops": 200.0, "metrics": {"exact_match": value}}
        for arm, values in (("sft", (0.25, 0.5, 0.25)), ("bash", (0.75, 1.0, 0.75)), ("noise", (0.5, 0.5, 0.5)))
        for seed, value in enumerate(values)
    ]
    text = evidence_pages.page("sort", lines)
    assert "| exact_match | **+0.500 [+0.498, +0.502]** | +0.167 [-0.192, +0.525] |" in text
    assert "| exact_match | -0.167 [-0.525, +0.192] | +0.333 [-0.025, +0.692] |" in text, "compared with the control"
    assert [line for line in text.splitlines() if line.startswith("| sft |")] == [
        "| sft | 0 | 2 | 200 | 0.250 |",
        "| sft | 1 | 2 | 200 | 0.500 |",
        "| sft | 2 | 2 | 200 | 0.250 |",
    ]
