"""`selfgen-ds probe`: what a few steps and rounds cost, and that nothing is left of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.forked import Run, command

pytestmark = [pytest.mark.test, pytest.mark.timeout(200)]


def _recipe(folder: Path) -> list[str]:
    runs.write_rows(folder)
    (folder / "recipe.yaml").write_text(runs.YAML.format(folder=folder), encoding="utf-8")
    return ["--config", str(folder / "recipe.yaml"), "--train.max_steps", "3"]


def _cost(log: str) -> dict[str, float]:
    cost: dict[str, float] = json.loads(next(line for line in reversed(log.splitlines()) if line.startswith("{")))
    return cost


def test_a_probe_says_what_the_run_says_and_leaves_nothing(tmp_path: Path) -> None:
    """The operations of steps and of the round are together those of the run's own metrics."""
    recipe = [*_recipe(tmp_path), "--selfgen.method", "bash"]
    probe = Run(["probe", *recipe, "--steps", "2"], tmp_path)
    assert probe.wait() == [0, 0], probe.output(0)[-3000:]
    cost = _cost(probe.output(0))
    assert not list(tmp_path.glob("run*"))
    run = Run(["train", *recipe], tmp_path)
    assert run.wait() == [0, 0], run.output(0)[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:2]]
    assert (cost["steps"], cost["total_steps"], cost["rows_per_step"], cost["rounds"]) == (2, 3, 4, 1)
    assert cost["round_flops"] > 0
    assert cost["step_flops"] + cost["round_flops"] == pytest.approx(sum(line["flops"] for line in lines))
    assert all(line["no_grad_tokens"] == 0 for line in lines[1:])


def test_a_probe_of_no_step_loads_and_checks_everything(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    log = tmp_path / "log"
    assert command(["probe", *recipe, "--steps", "0"], log) == 0, log.read_text()
    cost = _cost(log.read_text())
    assert (cost["steps"], cost["total_steps"], cost["step_flops"]) == (0, 3, 0)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    assert command(["probe", *recipe, "--steps", "0"], log) == 2
    assert "rows.jsonl, line" in log.read_text()
