"""The operations of a step: 6 a parameter and token, 8 with recomputation, less where few parameters are trained."""

from __future__ import annotations

import pytest
from torch import nn

from selfgen_ds.config import DataConfig, Recipe, TrainConfig
from selfgen_ds.engine.flops import step_flops
from selfgen_ds.engine.step import StepResult


@pytest.mark.parametrize(
    ("checkpointing", "all_trained", "expected"),
    [
        (False, True, 100 * 6 * 1010 + 30 * 2 * 1010),
        (True, True, 100 * 8 * 1010 + 30 * 2 * 1010),
        (False, False, 100 * (4 * 1010 + 2 * 10) + 30 * 2 * 1010),
    ],
)
def test_the_operations_follow_from_tokens_and_parameters(
    checkpointing: bool, all_trained: bool, expected: float
) -> None:
    model = nn.Sequential(nn.Linear(100, 10, bias=False), nn.Linear(10, 1, bias=False))
    model[0].weight.requires_grad_(all_trained)
    train = TrainConfig(max_steps=1, activation_checkpointing=checkpointing)
    recipe = Recipe(output_dir="x", deepspeed="zero3_cpu", data=DataConfig(train="rows.jsonl"), train=train)
    result = StepResult(
        loss=0.0,
        learning_rate=0.0,
        router_loss=None,
        grad_norm=0.0,
        drawn=0,
        differing=0,
        tokens=100,
        no_grad_tokens=30,
        applied=True,
        suspects=[],
    )
    assert step_flops(recipe, model)(result) == expected
