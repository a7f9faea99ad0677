"""Adapters under real ZeRO: what is trained, drawn from, saved and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaForCausalLM, set_seed

from selfgen_ds.config import LoraConfig, ModelConfig, OptimConfig, Recipe
from selfgen_ds.prepare import prepare
from tests.distributed import runs
from tests.distributed.test_equivalence import plain_training
from tests.ranks import Ranks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs.write_rows(tmp_path)
    return tmp_path


def adapting(folder: Path, lora: LoraConfig | None = None, tied: bool = False, **changes: Any) -> Recipe:
    path = runs.write_model(folder, tie_word_embeddings=tied)
    (folder / "model").rename(folder / "base") if not (folder / "base").exists() else None
    model = ModelConfig(name_or_path=str(folder / "base"), dtype="float32", lora=lora or LoraConfig(r=4, lora_alpha=16))
    return runs.recipe(folder, model=model, **changes)


def with_stage(folder: Path, stage: int) -> str:
    (folder / "stage.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return str(folder / "stage.json")


def fresh_reference(settings: Recipe) -> peft.PeftModel:
    """The model with the adapters that the run starts from, by `peft` alone."""
    assert settings.model.name_or_path is not None
    lora = settings.model.lora
    assert lora is not None
    model = LlamaForCausalLM.from_pretrained(settings.model.name_or_path)
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"
    )
    set_seed(settings.seed)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize(
    ("stage", "tied", "checkpointing"), [(3, False, True), (3, True, False), (2, False, True), (1, True, True), (0, False, False)]
)
def test_training_equals_plain_torch_and_peft(
    two_ranks: Ranks, folder: Path, stage: int, tied: bool, checkpointing: bool
) -> None:
    settings = adapting(folder, tied=tied, deepspeed=with_stage(folder, stage))
    settings.train.activation_checkpointing = checkpointing
    results = two_ranks.run(runs.losses_parameters_contexts, settings, 4)
    reference = fresh_reference(settings)
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    losses, _, _, expected = plain_training(settings, results[0][2] | results[1][2], 4, reference)
    assert results[0][0] == pytest.approx(losses, rel=1e-5)
    moved = 0
    for name, parameter in results[0][1].items():
        wanted = expected[f"base_model.model.{name}"]
        if "lora_" in name:
            assert torch.allclose(parameter, wanted, rtol=1e-4, atol=2e-4), name
            moved += not torch.equal(wanted, before[f"base_model.model.{name}"])
        else:
            assert torch.equal(parameter, before[f"base_model.model.{name}"]), name
    assert moved == 2 * 7 * 3
