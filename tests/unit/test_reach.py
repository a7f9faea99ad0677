"""What text reaches in a model, and answers that must not depend on padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from selfgen_ds.config import DataConfig, ModelConfig, Recipe
from selfgen_ds.errors import Problems
from selfgen_ds.model import probe
from selfgen_ds.model.loading import most_positions
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.model.reductions import add_reductions
from selfgen_ds.validation.inputs import check_positions
from tests.architectures import ARCHITECTURES, attention
from tests.sources import SOURCES
from tests.tiers import sweep

RECURRENT = {"model_type": "recurrent_gemma", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
RECURRENT |= {"intermediate_size": 96, "lru_width": 32, "attention_window_size": 16, "head_dim": 8}


def configuration(preset: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(**{"vocab_size": 300, "pad_token_id": 1} | preset)


@sweep("name", ARCHITECTURES)
def test_text_reaches_every_parameter_of_a_text_model(name: str) -> None:
    preset = ARCHITECTURES[name]
    settings = ModelConfig(preset=preset, attn_implementation=attention(name))
    traits = probe.check(settings, configuration(preset), packing=False)
    model = AutoModelForCausalLM.from_config(configuration(preset))
    assert traits.reach.unreached(model) == []
    assert traits.reach.routing_modules(model) == []
    assert traits.sharing == "any"


@pytest.mark.parametrize("half", [range(0, 300, 2), range(1, 300, 2), range(150), range(150, 300)], ids=str)
def test_prompts_share_a_batch_whatever_ends_an_answer(half: range) -> None:
    preset = ARCHITECTURES["llama"] | {"eos_token_id": list(half)}
    traits = probe.check(ModelConfig(preset=preset), configuration(preset), packing=False, training=False)
    assert traits.sharing == "any"


def test_text_does_not_reach_the_tower_of_a_multimodal_model(tmp_path: Path) -> None:
    path = str(SOURCES["a vision tower that text does not reach"](tmp_path))
    settings = ModelConfig(name_or_path=path, attn_implementation="eager")
    traits = probe.check(settings, AutoConfig.from_pretrained(path), packing=False)
    model = AutoModelForCausalLM.from_pretrained(path)
    tower = [n for n, _ in model.named_parameters() if "vision_tower" in n or "multi_modal_projector" in n]
    assert traits.reach.unreached(model) == tower
    assert len({name.split("layers.")[1][0] for name in tower if "layers." in name}) == 2, "the copy has one layer"


RWKV = {"model_type": "rwkv", "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("preset", "sharing"), [(RECURRENT, "one length"), (RWKV, "none")], ids=["reads padding", "mixes rows"]
)
def test_answers_of_a_model_that_reads_other_rows_do_not_depend_on_their_batch(
    preset: dict[str, Any], sharing: Any
) -> None:
    config = configuration(preset | {"eos_token_id": 299})
    settings = ModelConfig(preset=preset, attn_implementation="eager")
    assert probe.check(settings, config, packing=False, training=False).sharing == sharing
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model = add_reductions(model)
    prompts = [torch.randint(2, 290, (length,)).tolist() for length in (9, 4, 9, 6, 4)]

    def answers(prompts: list[list[int]], sharing: Any) -> list[list[int]]:
        policy = EnginePolicy(model, end_tokens=[299], sharing=sharing)
        return policy.complete(prompts, 8)

    alone = [answers([prompt], "any")[0] for prompt in prompts]
    assert answers(prompts, sharing) == alone
    assert answers(prompts, "any") != alone, "the batch changes nothing here"


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}


@pytest.mark.parametrize("original", [16, 64])
def test_rows_may_not_pass_the_length_at_which_longrope_changes(original: int) -> None:
    preset = ARCHITECTURES["phi3"] | {"rope_parameters": LONGROPE, "original_max_position_embeddings": original}
    config = configuration(preset)
    assert most_positions(config) == original
    problems = Problems()
    recipe = Recipe(output_dir="", deepspeed="", data=DataConfig(train="", max_length=65))
    check_positions(problems, recipe, config)
    (line,) = problems.lines
    assert line.startswith(f"data.max_length: expected at most the model's {original} positions before LongRoPE ")
    assert line.endswith("256 in all), got 65")
