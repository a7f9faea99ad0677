"""Folders of evaluated runs, as train and evaluate write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selfgen_ds.config import DataConfig, ModelConfig, Recipe, SelfgenConfig, to_yaml


def prediction(sample_id: int, exact_match: float, loss: float, tokens: int) -> dict[str, Any]:
    """Return a line of `predictions.jsonl` with a metric, a loss and a number of tokens."""
    statistics = {"exact_match": [exact_match, 1.0], "loss": [loss * tokens, float(tokens)]}
    texts = {"prompt": "p", "reference": "r", "answer": "a"}
    flags = {"teacher_forced": [True], "free_running": [False], "recovery": [[True]]}
    likelihoods = {"log_likelihoods": [-0.1], "own_log_likelihoods": [-0.2]}
    return {"sample_id": sample_id, **texts, **flags, **likelihoods, "statistics": statistics}


def run_folder(
    folder: Path,
    exact_match: list[float],
    *,
    method: str = "sft",
    seed: int = 0,
    model: str = "start",
    dtype: Literal["float32", "bfloat16"] = "float32",
    data: str = "test.jsonl",
    first_sample_id: int = 0,
    rows_of_a_prompt: int = 1,
    losses: list[tuple[float, int]] | None = None,
) -> str:
    """Write a run with a metric, and loss and tokens of each row, as train and evaluate do; return its folder."""
    recipe = Recipe(
        output_dir=str(folder),
        deepspeed="zero3.json",
        data=DataConfig(train="train.jsonl"),
        model=ModelConfig(name_or_path=model, dtype=dtype),
        selfgen=SelfgenConfig(method=method),
        seed=seed,
    )
    rows = [
        prediction(first_sample_id + i, value, loss, tokens) | {"prompt": f"p{i // rows_of_a_prompt}"}
        for i, (value, (loss, tokens)) in enumerate(
            zip(exact_match, losses or [(1.0, 2)] * len(exact_match), strict=True)
        )
    ]
    settings = {"data": data, "prompt_column": "prompt", "completion_column": "completion", "max_length": 64}
    evaluation = {
        "data": data,
        "metrics": {"exact_match": float(np.mean(exact_match))},
        "curves": {},
        "settings": settings,
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(recipe))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)
