"""Check the probe: how it finds a model's logit transform, and which models it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from selfgen_ds.config import ModelConfig
from selfgen_ds.errors import InputError
from selfgen_ds.model import probe, small_copy
from selfgen_ds.model.budget import sweep_budget
from selfgen_ds.model.head import LogitTransform
from tests.architectures import ARCHITECTURES, DEEPSEEK_V3, attention
from tests.distributed import runs
from tests.tiers import sweep


def configuration(preset: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(**{"vocab_size": 300, "pad_token_id": 1} | preset)


def check(
    preset: dict[str, Any], packing: bool = False, attn_implementation: Any = "sdpa", training: bool = True
) -> LogitTransform:
    return probe.check(
        ModelConfig(preset=preset, attn_implementation=attn_implementation), configuration(preset), packing, training
    ).logit_transform


TRANSFORMS = {
    "gemma2": LogitTransform(cap=3.0),
    "gemma2, untied": LogitTransform(cap=3.0),
    "cohere": LogitTransform(scale=0.25),
    "granite": LogitTransform(scale=0.25),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_model_that_scales_or_caps_its_logits_is_let_through_with_their_transform(name: str) -> None:
    assert check(ARCHITECTURES[name], True, attention(name)) == TRANSFORMS[name]


LARGE: dict[str, tuple[dict[str, Any], LogitTransform]] = {
    "Llama 3.1 8B": (
        {
            "model_type": "llama",
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131_072,
        },
        LogitTransform(),
    ),
    "Mixtral 8x7B": ({"model_type": "mixtral"}, LogitTransform()),
    "Gemma 2 9B": (
        {
            "model_type": "gemma2",
            "vocab_size": 256_000,
            "hidden_size": 3584,
            "intermediate_size": 14_336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
        },
        LogitTransform(cap=30.0),
    ),
    "Phi 3.5 mini, long rotary factors": (
        {
            "model_type": "phi3",
            "max_position_embeddings": 131_072,
            "original_max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
            },
        },
        LogitTransform(),
    ),
    "Gemma 3 4B, with its image tower": ({"model_type": "gemma3"}, LogitTransform()),
}


@sweep("name", LARGE)
def test_a_large_model_is_tried_as_a_small_one(name: str) -> None:
    preset, transform = LARGE[name]
    preset = {"pad_token_id": 0} | preset
    settings = ModelConfig(preset=preset, attn_implementation="eager" if preset["model_type"] == "gemma2" else "sdpa")
    assert probe.check(settings, AutoConfig.for_model(**preset), packing=True).logit_transform == transform


@sweep("model_type", ["zamba2", "mamba2", "rwkv", "codegen"])
def test_a_large_model_without_attention_heads_or_with_several_kinds_of_heads_is_tried_as_a_small_one(
    model_type: str,
) -> None:
    preset = {"model_type": model_type, "pad_token_id": 0}
    with torch.no_grad():
        settings = ModelConfig(preset=preset, attn_implementation="eager")
        small = small_copy.small_copy(settings, AutoConfig.for_model(**preset))
    assert sum(parameter.numel() for parameter in small.parameters()) < 50_000_000


def test_a_model_whose_layers_have_numbers_of_heads_of_their_own_has_a_small_copy_and_a_budget() -> None:
    config = AutoConfig.for_model("dots3_note_text", router_aux_loss_coef=0.0)
    with torch.no_grad():
        small = small_copy.small_copy(ModelConfig(preset={}), config)
    assert small.config.num_hidden_layers < config.num_hidden_layers
    budget = sweep_budget(config, activation_checkpointing=True, prefetched=0, packed_length=None)
    assert 0 < budget.forward < budget.training


def test_a_list_of_the_layers_numbers_does_not_make_every_layer_another_kind() -> None:
    config = AutoConfig.for_model("llama4_text")
    assert config.moe_layers == list(range(48))
    assert small_copy._shallow(config).num_hidden_layers < 10


OPT = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "word_embed_proj_dim": 32
}
BLOOM = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}
MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


@pytest.mark.parametrize("preset", [OPT, BLOOM, MAMBA], ids=lambda preset: preset["model_type"])
def test_models_that_mix_packed_samples_are_refused_for_packing_alone(preset: dict[str, Any]) -> None:
    attn_implementation = "sdpa" if preset is OPT else "eager"
    assert check(preset, False, attn_implementation) == LogitTransform()
    with pytest.raises(InputError, match=rf"data\.packing: model type '{preset['model_type']}' does not keep"):
        check(preset, True, attn_implementation)


def test_a_model_that_may_mix_samples_unseen_is_refused_for_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states that do not depend on other tokens cannot show whether samples are mixed."""
    forward = LlamaModel.forward

    def blind(self: LlamaModel, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        flat = forward(self, input_ids=input_ids.reshape(-1, 1), **kwargs)
        flat.last_hidden_state = flat.last_hidden_state.reshape(*input_ids.shape, -1)
        return flat

    monkeypatch.setattr(LlamaModel, "forward", blind)
    with pytest.raises(InputError, match="cannot tell whether"):
        check(ARCHITECTURES["llama"], packing=True)


def test_an_unknown_transform_of_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaForCausalLM.forward

    def shifted(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits + output.logits**2 / 100
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", shifted)
    with pytest.raises(InputError, match=r"model type 'llama' .* in a way that selfgen-ds does not support"):
        check(ARCHITECTURES["llama"])


@pytest.mark.parametrize("cap", [0.05, 1000.0])
def test_a_cap_that_the_configuration_has_and_the_model_does_not_apply_is_seen(
    monkeypatch: pytest.MonkeyPatch, cap: float
) -> None:
    preset = ARCHITECTURES["gemma2"] | {"final_logit_softcapping": cap}
    assert check(preset, attn_implementation="eager") == LogitTransform(cap=cap)
    monkeypatch.setattr(Gemma2ForCausalLM, "forward", LlamaForCausalLM.forward)
    assert check(preset, attn_implementation="eager") == LogitTransform()


@pytest.mark.parametrize("logits_scaling", [0.01, 1.0, 13.0])
def test_a_scale_of_any_size_is_seen(logits_scaling: float) -> None:
    preset = ARCHITECTURES["granite"] | {"logits_scaling": logits_scaling}
    assert check(preset).scale == pytest.approx(1 / logits_scaling)


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    preset = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    with pytest.raises(InputError, match="model type 'bert' is not causal"):
        check(preset)


def test_an_attention_kernel_that_the_model_lacks_is_named() -> None:
    with pytest.raises(InputError, match=r"model\.attn_implementation: model type 'gemma2' has no sdpa"):
        check(ARCHITECTURES["gemma2"])


def test_a_mixture_of_experts_without_a_router_loss_is_refused_unless_none_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"model type 'deepseek_v3' is a mixture .* router_aux_loss_coef: 0\.0"):
        check(DEEPSEEK_V3)
    assert check(DEEPSEEK_V3 | {"router_aux_loss_coef": 0.0}) == LogitTransform()
    with pytest.raises(InputError, match="router loss cannot be computed"):
        check(DEEPSEEK_V3 | {"router_aux_loss_coef": 0.1})


@pytest.mark.parametrize("fields", [{}, {"router_aux_loss_coef": 0.1}])
def test_a_mixture_of_experts_is_evaluated_without_a_router_loss(fields: dict[str, Any]) -> None:
    assert check(DEEPSEEK_V3 | fields, training=False) == LogitTransform()
    assert check(ARCHITECTURES["mixtral"], training=False) == LogitTransform()


WINDOWS = {
    "Mistral 7B": ({"model_type": "mistral", "sliding_window": 4096, "num_hidden_layers": 4}, "sliding_window"),
    "Gemma 3": ({"model_type": "gemma3_text", "sliding_window": 1024, "num_hidden_layers": 6}, "sliding_window"),
    "Llama 4": (
        {"model_type": "llama4_text", "attention_chunk_size": 8192, "num_hidden_layers": 4},
        "attention_chunk_size",
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_the_window_of_a_shrunk_model_ends_inside_a_sample(name: str) -> None:
    preset, field = WINDOWS[name]
    preset = {"pad_token_id": 0} | preset
    with torch.no_grad():
        small = small_copy.small_copy(ModelConfig(preset=preset), AutoConfig.for_model(**preset))
    window = getattr(small.config, field)
    assert 1 < window < min(probe._LENGTHS)
    assert all(length % window for length in probe._LENGTHS)


def test_a_type_that_leaves_weights_unset_is_refused_from_scratch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = runs.write_model_of(tmp_path, ARCHITECTURES["llama"])
    build = LlamaModel.__init__

    def with_an_unset_weight(self: LlamaModel, config: PretrainedConfig) -> None:
        build(self, config)
        self.norm.shift = torch.nn.Parameter(torch.empty(3))

    monkeypatch.setattr(LlamaModel, "__init__", with_an_unset_weight)
    with pytest.raises(InputError, match=r"^model\.preset: model type 'llama' does not initialize model\.norm\.shift"):
        check(ARCHITECTURES["llama"])
    assert not torch.are_deterministic_algorithms_enabled()
    probe.check(ModelConfig(name_or_path=path), AutoConfig.from_pretrained(path), packing=False)


def test_random_generators_are_left_as_they_were() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check(ARCHITECTURES["llama"])
    assert torch.equal(torch.get_rng_state(), before)
