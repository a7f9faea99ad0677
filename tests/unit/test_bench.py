"""What `bench` refuses before it starts ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfgen_ds.config import DataConfig, Recipe
from selfgen_ds.errors import InputError
from selfgen_ds.scaling import bench
from tests.distributed import runs


def test_rows_that_are_too_short_to_bench_are_refused() -> None:
    settings = Recipe(output_dir="", deepspeed="", data=DataConfig(train="", max_length=15))
    with pytest.raises(InputError, match=r"data\.max_length: expected 16 or more"):
        bench.bench(settings, set(), "budget", 1)


def test_a_json_that_fixes_the_accumulation_is_refused_for_blocks_that_have_another(tmp_path: Path) -> None:
    path = tmp_path / "fixed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 1}))
    settings = Recipe(
        output_dir=str(tmp_path), deepspeed=str(path), data=DataConfig(train="builtin:pointer_chase", max_length=16)
    )
    settings.model.preset, settings.model.tokenizer = runs.PRESET, "byte"
    settings.train.max_steps = 1
    with pytest.raises(InputError, match=r"gradient_accumulation_steps=1 differs from the recipe"):
        bench.bench(settings, set(), "budget", 1)
