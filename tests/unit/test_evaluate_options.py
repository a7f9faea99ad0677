"""Options of `evaluate` that are wrong are named, with what is expected, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfgen_ds.config import EvaluateOptions
from selfgen_ds.errors import Problems
from selfgen_ds.validation.options import check_evaluate


def _problems(folder: Path, **changes: Any) -> list[str]:
    (folder / "config.json").write_text("{}")
    options = EvaluateOptions(model=str(folder), data="builtin:pointer_chase", output_dir=str(folder))
    problems = Problems()
    check_evaluate(problems, replace(options, **changes))
    return problems.lines


def test_the_defaults_are_fine(tmp_path: Path) -> None:
    assert not _problems(tmp_path)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sample_temperatures": [1.0, 0.0]}, "--sample_temperatures: expected numbers above 0, got [1.0, 0.0]"),
        ({"sample_temperatures": [1.0, 1.0]}, "--sample_temperatures: expected every value once, got [1.0, 1.0]"),
        ({"answers_per_prompt": 4}, "--answers_per_prompt: expected --sample_temperatures as well"),
        ({"prefix_shares": [1.5]}, "--prefix_shares: expected shares from 0 to less than 1, got [1.5]"),
        ({"forced_error_shares": [-0.1]}, "--forced_error_shares: expected shares from 0 to less than 1, got [-0.1]"),
        ({"weight_noise": [0.0]}, "--weight_noise: expected numbers above 0, got [0.0]"),
        ({"cue": "Sure?"}, "--cue: expected --correction_rounds as well"),
        ({"judge_url": "http://localhost/v1"}, "--judge_model: expected with --judge_url, and only then"),
        (
            {"judge_url": "localhost:8000", "judge_model": "m"},
            "--judge_url: expected http://... or https://..., got 'localhost:8000'",
        ),
        ({"metric": "mm"}, "--metric: expected module:function, got 'mm'"),
        ({"oracle": "runs/no/oracle"}, "--oracle: expected an existing folder, got 'runs/no/oracle'"),
        ({"judge_against": "runs/other"}, "--judge_against: expected --judge_url as well"),
        (
            {"judge_url": "http://localhost/v1", "judge_model": "m", "judge_against": "nowhere"},
            "--judge_against: expected `reference` or a folder with predictions.jsonl, got 'nowhere'",
        ),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    assert _problems(tmp_path, **changes) == [line]


def test_an_oracle_that_is_the_model_is_refused_by_whatever_path(tmp_path: Path) -> None:
    oracle = str(tmp_path / ".." / tmp_path.name)
    assert _problems(tmp_path, oracle=oracle) == [f"--oracle: expected another model than --model, got {oracle!r}"]
