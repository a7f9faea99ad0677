"""Modules whose parts run for some rows only: trained as in one process, or refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from selfgen_ds.config import ModelConfig, Recipe
from tests.distributed import runs
from tests.ranks import Ranks
from tests.remote_code import write_list_moe
from tests.tiers import matrix

OPT = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"word_embed_proj_dim": 32, "layerdrop": 0.1, "max_position_embeddings": 256}


def recipe(folder: Path, stage: int, model: ModelConfig) -> Recipe:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    (folder / f"stage-{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    return runs.recipe(folder, deepspeed=str(folder / f"stage-{stage}.json"), model=model, selfgen=runs.SFT)


def list_moe(folder: Path) -> ModelConfig:
    path = folder / "model"
    if not path.exists():
        write_list_moe(folder)
    return ModelConfig(name_or_path=str(path), dtype="float32", trust_remote_code=True)


@matrix("stage", [3, 0])
def test_experts_in_a_list_are_trained_as_in_one_process(
    one_rank: Ranks, two_ranks: Ranks, folder: Path, stage: int
) -> None:
    alone = recipe(folder, 0, list_moe(folder))
    alone.train.gradient_accumulation_steps *= 2  # the rows of a step
    ((losses, parameters, _),) = one_rank.run(runs.losses_parameters_contexts, alone, 3)
    for found, trained, _ in two_ranks.run(runs.losses_parameters_contexts, recipe(folder, stage, list_moe(folder)), 3):
        assert found == pytest.approx(losses, rel=1e-5)
        for name, parameter in parameters.items():
            torch.testing.assert_close(trained[name], parameter, rtol=1e-3, atol=1e-4)


def test_experts_in_a_list_are_refused_at_stages_that_sum_the_wrong_gradients(two_ranks: Ranks, folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"stage: expected stage 3 or 0, got 2: model\.layers\.\d\.mlp runs parts"):
        two_ranks.run(runs.first_step, recipe(folder, 2, list_moe(folder)))


def test_skipped_layers_are_refused(two_ranks: Ranks, folder: Path) -> None:
    model = ModelConfig(preset=OPT, tokenizer="byte", dtype="float32")
    with pytest.raises(AssertionError, match=r"stage: expected stage 0, got 3: model\.decoder runs parts of itself"):
        two_ranks.run(runs.first_step, recipe(folder, 3, model))
