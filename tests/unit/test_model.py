"""Check which models are accepted, and the reduced forward: losses, packed rows, and router losses."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from selfgen_ds.config import ModelConfig
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.model import head, probe
from selfgen_ds.model.budget import sweep_budget
from selfgen_ds.model.loading import build_model, checkpoint_activations, model_config, most_positions
from selfgen_ds.model.reductions import add_reductions, backbone, packed_settings, places_of, router_loss_coefficient
from tests.architectures import ARCHITECTURES, EVERY_ARCHITECTURE, attention


def preset(**fields: Any) -> ModelConfig:
    return ModelConfig(preset=fields, tokenizer="byte", dtype="float32")


def test_a_preset_without_a_type_is_a_llama() -> None:
    config = model_config(preset(hidden_size=64), byte_tokenizer())
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("llama", 64, 258)


def test_a_preset_of_another_type_takes_that_types_fields_and_their_common_names() -> None:
    config = model_config(preset(model_type="gpt2", n_embd=64, num_attention_heads=2), byte_tokenizer())
    assert (config.model_type, config.hidden_size, config.n_head, config.vocab_size) == ("gpt2", 64, 2, 258)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"model_type": "lama"}, "model.preset: model_type: expected a model type of transformers, got 'lama'"),
        ({"n_embd": 64}, "model.preset: not fields of a llama configuration: n_embd"),
        ({"model_type": "gpt2", "head_size": 8, "z": 1}, "not fields of a gpt2 configuration: head_size, z"),
        ({"model_type": "gpt2", "n_embd": "wide"}, "model.preset: .*n_embd"),
        ({"model_type": "bart"}, "model: expected a causal language model, got model type 'bart'"),
        ({"model_type": "t5"}, "model: expected a causal language model, got model type 't5'"),
        ({"model_type": "vit"}, "model: expected a causal language model, got model type 'vit'"),
        ({"vocab_size": 200}, "258 ids, but the model has embeddings for 200; model.resize_embeddings=true adds"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_preset_that_cannot_be_trained_is_refused_in_one_line(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem) as error:
        model_config(preset(**fields), byte_tokenizer())
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_fewer_ids_than_the_model_is_fine_and_decodes_ids_without_a_token() -> None:
    tokenizer = byte_tokenizer()
    assert model_config(preset(vocab_size=300), tokenizer).vocab_size == 300
    assert tokenizer.decode([72, 299, 73], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        ({"model_type": "gpt2", "n_positions": 77}, 77),
        ({"max_position_embeddings": 99}, 99),
        ({"model_type": "bloom"}, None),
    ],
    ids=["gpt2", "llama", "bloom"],
)
def test_the_longest_row_is_the_configurations_limit_if_it_has_one(
    fields: dict[str, Any], positions: int | None
) -> None:
    assert most_positions(model_config(preset(**fields), byte_tokenizer())) == positions


def test_what_turns_the_router_loss_off_is_a_field_of_any_preset() -> None:
    config = model_config(preset(model_type="deepseek_v3", router_aux_loss_coef=0), byte_tokenizer())
    assert router_loss_coefficient(config) == 0.0
    assert router_loss_coefficient(model_config(preset(model_type="deepseek_v3"), byte_tokenizer())) is None


LLAMA4: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 2,
    "attention_chunk_size": 8,
}
GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 50,
    "vocab_size_per_layer_input": 50,
    "hidden_size_per_layer_input": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
}


@pytest.mark.parametrize("fields", [LLAMA4, GEMMA4], ids=lambda fields: fields["model_type"])
def test_the_hidden_states_are_those_that_the_output_layer_reads(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32).eval()
    context = torch.randint(0, 50, (2, 7))
    hidden = backbone(model, context).last_hidden_state
    assert hidden.shape == (2, 7, 32)
    torch.testing.assert_close(model.get_output_embeddings()(hidden), model(context, use_cache=False).logits)


def test_a_model_whose_layers_differ_has_a_budget_that_grows_with_its_heads() -> None:
    narrow, wide = (
        sweep_budget(AutoConfig.for_model(**GEMMA4 | {"head_dim": size}), True, 0, None) for size in (8, 64)
    )
    assert 0 < narrow.training < wide.training


def test_an_output_layer_that_is_not_linear_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"vocab_size": 50} | ARCHITECTURES["llama"]))
    model.lm_head = nn.Identity()
    with pytest.raises(InputError, match="model type 'llama' has no linear output layer"):
        add_reductions(model)


@pytest.mark.parametrize("tied", [True, False])
def test_added_embeddings_are_the_mean_of_the_old_ones(tmp_path: Path, tied: bool) -> None:
    fields = ARCHITECTURES["llama"] | {"vocab_size": 50, "tie_word_embeddings": tied}
    saved = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    saved.save_pretrained(tmp_path)
    settings = ModelConfig(name_or_path=str(tmp_path), dtype="float32", resize_embeddings=True)
    config = model_config(settings, byte_tokenizer())
    model = build_model(settings, config, None, 258)
    assert model.config.vocab_size == 258
    for layer, old in (
        (model.get_input_embeddings(), saved.get_input_embeddings()),
        (model.get_output_embeddings(), saved.get_output_embeddings()),
    ):
        assert torch.equal(layer.weight[:50], old.weight)
        torch.testing.assert_close(layer.weight[50:], old.weight.mean(dim=0).expand(208, -1))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def _by_segments(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as flash attention computes it: within the segments whose ends the call is given, without a mask."""
    assert attention_mask is None
    whole = torch.tensor([0, query.shape[2]], dtype=torch.int32)
    ends, others = (options.get(name, whole) for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    assert (ends.dtype, torch.equal(ends, others)) == (torch.int32, True)
    if ends is not whole:
        assert options["max_length_q"] == options["max_length_k"] == int(ends.diff().max())
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    parts = [t.split(ends.diff().tolist(), dim=2) for t in (query, key, value)]
    found = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options["scaling"])
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("flash_by_segments", _by_segments)


LENGTHS = (9, 6)
EAGER_TOO = ("llama", "mistral", "gemma3_text", "gpt2")  # with eager attention in `make test`, others in test-all
OTHERS_EAGER = [name for name in ARCHITECTURES if attention(name) != "eager" and name not in EAGER_TOO]
PACKED = [
    *((name, attention(name), True) for name in ("llama", "gemma2", "mixtral", "gpt2", "mistral")),
    ("llama", "eager", True),
    ("llama", "sdpa", False),
    ("llama", "flash_by_segments", True),
]
"""The cases in `make check`."""
MORE_PACKED = [
    *((name, attention(name), True) for name in ARCHITECTURES),
    *((name, "eager", True) for name in EAGER_TOO),
    ("gemma2", "eager", False),
]


def fields_of(name: str) -> dict[str, Any]:
    return ARCHITECTURES[name] | {"vocab_size": 50, "pad_token_id": None, "initializer_range": 0.5}


def _built(attn_implementation: str) -> str:
    """Return what a model is built with: transformers asks for a package where a name has `flash` in it."""
    return "sdpa" if attn_implementation == "flash_by_segments" else attn_implementation


@cache
def logit_transform(name: str, attn_implementation: str) -> head.LogitTransform:
    settings = ModelConfig(preset=fields_of(name), attn_implementation=attn_implementation)
    return probe.check(settings, AutoConfig.for_model(**fields_of(name)), packing=True).logit_transform


def extended(name: str, attn_implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**fields_of(name))
    kind = _built(attn_implementation)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kind)
    if kind != attn_implementation:
        model.config._attn_implementation_internal = attn_implementation
    return add_reductions(model, logit_transform(name, kind)).train()


def packed_row() -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, loss positions, and position ids of one row that holds two samples."""
    torch.manual_seed(1)
    context = torch.randint(0, 50, (1, sum(LENGTHS)))
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return context, position_ids > 2, position_ids


@EVERY_ARCHITECTURE
def test_the_loss_and_gradients_of_every_architecture_are_those_of_plain_transformers(name: str) -> None:
    model = extended(name, attention(name))
    plain = AutoModelForCausalLM.from_config(model.config, attn_implementation=attention(name))
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    context = torch.randint(0, 50, (2, 12))
    positions = torch.arange(12) > torch.tensor([[2], [5]])
    loss = model(context, positions=places_of(positions), reduction=head.loss_sum(context[positions], 0.0))
    logits = plain(context, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits[positions[:, 1:]], context[positions], reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    gradients, expected_gradients = (
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, plain)
    )
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        atol = 1e-4 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-3, atol=atol)


@pytest.mark.parametrize(
    ("name", "attn_implementation", "checkpointing"),
    [
        *PACKED,
        *(pytest.param(*case, marks=pytest.mark.test) for case in MORE_PACKED if case not in PACKED),
        *(pytest.param(name, "eager", True, marks=pytest.mark.slow) for name in OTHERS_EAGER),
    ],
)
def test_a_packed_row_has_the_loss_and_the_gradients_of_its_samples_apart(
    name: str, attn_implementation: str, checkpointing: bool
) -> None:
    model = extended(name, attn_implementation)
    if checkpointing:
        checkpoint_activations(model, offload=False)
    context, positions, position_ids = packed_row()
    parameters = list(model.parameters())

    def loss_of(context: Tensor, positions: Tensor, position_ids: Tensor | None) -> Tensor:
        reduction = head.loss_sum(context[positions], 0.1)
        packed = None if position_ids is None else packed_settings(model, position_ids[:, :-1])
        return model(context, positions=places_of(positions), reduction=reduction, packed=packed)

    together = loss_of(context, positions, position_ids)
    apart = sum(
        loss_of(c, p, None) for c, p in zip(context.split(LENGTHS, 1), positions.split(LENGTHS, 1), strict=True)
    )
    naive = loss_of(context, positions, None)
    assert isinstance(apart, Tensor)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)
    assert abs((naive - apart).item()) > 1e-2, "the test could not see a leak"
    for one, other in zip(
        torch.autograd.grad(together, parameters), torch.autograd.grad(apart, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_no_token_of_a_packed_row_sees_another_sample(name: str) -> None:
    model = extended(name, attention(name)).eval()
    context, _, position_ids = packed_row()
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        seen.append(output.requires_grad_())
        return output

    model.get_input_embeddings().register_forward_hook(keep)
    for own, other in (
        (slice(None, LENGTHS[0]), slice(LENGTHS[0], None)),
        (slice(LENGTHS[0], None), slice(None, LENGTHS[0])),
    ):
        hidden = backbone(model, context, packed_settings(model, position_ids)).last_hidden_state
        [gradient] = torch.autograd.grad(hidden[0, own].square().sum(), seen[-1:])
        assert gradient[0, own].abs().max() > 0
        assert torch.count_nonzero(gradient[0, other]) == 0


MIXTURES = [name for name, fields in ARCHITECTURES.items() if "router_aux_loss_coef" in fields]


def router_loss(model: PreTrainedModel, context: Tensor, real: Tensor) -> Tensor:
    none = torch.zeros_like(real)
    reduction = head.loss_sum(context[none], 0.0)
    loss, router = model(context, positions=places_of(none), reduction=reduction, routed=real)
    assert loss == 0
    return router


@pytest.mark.parametrize("name", MIXTURES)
def test_the_router_loss_counts_real_tokens_alone(name: str) -> None:
    model = extended(name, "sdpa")
    context, _, _ = packed_row()
    padded = torch.cat([context, torch.full((1, 5), 7)], dim=1)
    real = torch.arange(padded.shape[1])[None] < sum(LENGTHS)
    gates = model.base_model(input_ids=context[:, :-1], output_router_logits=True).router_logits
    expected = load_balancing_loss_func(gates, model.num_experts, model.num_experts_per_tok)
    torch.testing.assert_close(router_loss(model, context, torch.ones_like(context, dtype=torch.bool)), expected)
    torch.testing.assert_close(router_loss(model, padded, real), expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_router_loss_of_no_token_is_0_with_gradients_of_0(name: str) -> None:
    model = extended(name, "sdpa")
    context, _, _ = packed_row()
    loss = router_loss(model, context, torch.zeros_like(context, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
