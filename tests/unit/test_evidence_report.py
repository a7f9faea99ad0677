"""The results of studies: a line per run, which a second run replaces, and pages that show every seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import evidence_pages, evidence_report
from selfgen_ds.pilot.runs import Arm, StudyRun
from tests.evaluated import run_folder


def _named(folder: Path, arm: str, seed: int) -> StudyRun:
    own = folder / f"{arm}-{seed}"
    return StudyRun(arm=Arm(name=arm, settings={}), seed=seed, folder=own, recipe="demo", steps=2, evaluation={})


def _run(folder: Path, arm: str, seed: int, exact_match: float) -> StudyRun:
    run = _named(folder, arm, seed)
    run.folder.mkdir(exist_ok=True)
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
    for module in (evidence_report, evidence_pages):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")


def test_each_run_has_one_line_whose_last_result_counts(tmp_path: Path) -> None:
    for arm, seed, value in (("sft", 1, 0.5), ("sft", 0, 0.25), ("bash", 0, 0.75), ("sft", 1, 1.0)):
        evidence_report.write_run(_run(tmp_path, arm, seed, value), "sort", "test")
    lines = [json.loads(line) for line in (tmp_path / "results" / "sort.jsonl").read_text().splitlines()]
    found = [(line["arm"], line["seed"], line["metrics"]["exact_match"]) for line in lines]
    assert found == [("bash", 0, 0.75), ("sft", 0, 0.25), ("sft", 1, 1.0)]
    assert lines[0]["metrics"] == {"exact_match": 0.75, "loss": 0.12346, "differing_share": 0.5}
    assert (lines[0]["steps"], lines[0]["flops"]) == (2, 200.0)


def test_a_curve_has_the_evaluations_with_the_operations_until_then(tmp_path: Path) -> None:
    evidence_report.write_run(_run(tmp_path, "sft-curve", 0, 0.5), "sort", "curves")
    (line,) = (json.loads(line) for line in (tmp_path / "results" / "sort.jsonl").read_text().splitlines())
    assert line["curve"] == [{"step": 2, "flops": 200.0, "loss": 0.5}]


def test_arms_are_compared_with_sft_and_with_the_control_in_the_metrics_that_are_tested(tmp_path: Path) -> None:
    shares = {"sft": 0.25, "bash": 0.75, "noise": 0.5}
    runs = []
    for arm, share in shares.items():
        for seed in (0, 1, 2):
            values = [float(row < share * 40 + seed) for row in range(40)]
            run_folder(tmp_path / f"{arm}-{seed}", values, method=arm if arm != "noise" else "sft", seed=seed)
            runs.append(_named(tmp_path, arm, seed))
    (tmp_path / "results").mkdir()
    evidence_report.write_comparison(runs, "sort", "test")
    rows = json.loads((tmp_path / "results" / "sort-test.json").read_text())
    found = {
        (row["baseline"], row["method"]): row["paired_difference"] for row in rows if row["metric"] == "exact_match"
    }
    assert found == {("sft", "sft"): None, ("sft", "bash"): 0.5, ("sft", "noise"): 0.25, ("noise", "bash"): 0.25}
    assert {row["metric"] for row in rows} == {"exact_match", "loss"}, "those of the runs that are tested"


def test_a_page_shows_every_seed_and_marks_what_is_sure(tmp_path: Path) -> None:
    lines = [
        {"part": "test", "arm": arm, "seed": seed, "steps": 2.0, "flops": 200.0, "metrics": {"exact_match": value}}
        for arm, seed, value in (("sft", 0, 0.25), ("sft", 1, 0.5), ("bash", 0, 0.75))
    ]
    differences = [
        {"baseline": "sft", "method": "sft", "metric": "exact_match", "mean": 0.375, "paired_difference": None},
        {"baseline": "sft", "method": "bash", "metric": "exact_match", "mean": 0.75, "paired_difference": 0.375}
        | {"paired_low": 0.3, "paired_high": 0.45, "verdict": "better"},
    ]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "sort-test.json").write_text(json.dumps(differences))
    text = evidence_pages.page("sort", lines)
    assert "| exact_match | 0.375 | **+0.375 [+0.300, +0.450]** |" in text
    assert [line for line in text.splitlines() if line.startswith("| sft |")] == [
        "| sft | 0 | 2 | 200 | 0.250 |",
        "| sft | 1 | 2 | 200 | 0.500 |",
    ]
