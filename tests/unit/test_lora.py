"""Adapters without ranks: which layers get one, how they are merged, and which settings are refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedModel

from selfgen_ds.checkpoint import saving
from selfgen_ds.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    Recipe,
    TrainConfig,
    to_yaml,
)
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.model import lora, small_copy
from selfgen_ds.model.loading import build_model, model_config, trained_parameter_count
from selfgen_ds.model.reductions import add_reductions
from selfgen_ds.validation.output_folder import check_same_run
from tests.architectures import CTRL, DEEPSEEK_V3
from tests.problems import found_by, recipe_problems
from tests.tiers import sweep
from tests.unit.test_config import DEMO, _parse

LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, eos_token_id=1
)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, eos_token_id=1)


def built(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return add_reductions(AutoModelForCausalLM.from_config(config, dtype=dtype))


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def test_all_linear_layers_but_the_lm_head_are_adapted_and_nothing_else_is_trained() -> None:
    model = built(LLAMA)
    lora.add_adapter(model, LoraConfig(r=2), "base")
    projections = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    expected = {f"model.layers.{i}.{name}.weight" for i in range(2) for name in projections}
    assert lora.adapted_layers(model).keys() == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name.replace(".weight", f".lora_{x}.default.weight") for name in expected for x in "AB"
    }


MIXTRAL = MixtralConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=4,
    vocab_size=32,
    eos_token_id=1,
)
MIXTRAL_LAYERS = [f"model.layers.{i}.self_attn.{x}_proj.weight" for i in range(2) for x in "qkvo"]
GPT2_LAYERS = [
    f"transformer.h.{i}.{name}.weight"
    for i in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


@pytest.mark.parametrize(
    ("config", "expected"), [(MIXTRAL, MIXTRAL_LAYERS), (GPT2, GPT2_LAYERS)], ids=["experts", "transposed layers"]
)
def test_routers_and_experts_are_left_alone_and_transposed_layers_adapted(config: Any, expected: list[str]) -> None:
    model = built(config)
    lora.add_adapter(model, LoraConfig(r=2), "base")
    assert lora.adapted_layers(model).keys() == set(expected)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(expected)
    assert not [name for name in trained if "gate" in name or "router" in name or "experts" in name]


OTHERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    # peft takes `gate_proj` of the dense layer and of the shared expert for that of the fused experts
    "experts beside layers of the same names": (
        DEEPSEEK_V3 | {"head_dim": 8},
        {"self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"}
        | {"self_attn.o_proj"},
    ),
    "a state space whose output layer is fused": (
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        {"mixer.in_proj", "mixer.x_proj", "mixer.dt_proj"},
    ),
    "layers without names": (
        CTRL,
        {"multi_head_attention.Wq", "multi_head_attention.Wk", "multi_head_attention.Wv"}
        | {"multi_head_attention.dense", "ffn.0", "ffn.2"},
    ),
}


@pytest.mark.parametrize(("fields", "expected"), OTHERS.values(), ids=OTHERS)
def test_all_linear_suits_every_kind_of_model_and_comes_back_from_its_folder(
    tmp_path: Path, fields: dict[str, Any], expected: set[str]
) -> None:
    config = AutoConfig.for_model(**fields | {"vocab_size": 32, "eos_token_id": 1, "pad_token_id": 0})
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).eval()
    model = copy.deepcopy(plain)
    lora.add_adapter(model, LoraConfig(r=2), str(tmp_path / "base"))
    assert {re.split(r"\.\d+\.", name, maxsplit=1)[1] for name in lora.adapted_layers(model)} == {
        f"{name}.weight" for name in expected
    }
    randomized(model)
    (tmp_path / "adapter").mkdir()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    lora.save_adapter(model, trained, tmp_path / "adapter")
    ids = torch.randint(32, (1, 9))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "adapter")).eval()
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert not torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-2)


@sweep(
    "model_type", ["glm4_moe", "phimoe", "ernie4_5_moe", "llama4_text", "gemma4_text", "qwen3_next", "rwkv"], check=0
)
def test_all_linear_adapts_other_types_and_comes_back_from_its_folder(tmp_path: Path, model_type: str) -> None:
    config = AutoConfig.for_model(model_type, pad_token_id=0)
    with torch.no_grad():
        plain = small_copy.small_copy(ModelConfig(preset={}, attn_implementation="eager"), config)
    model = copy.deepcopy(plain)
    lora.add_adapter(model, LoraConfig(r=2), str(tmp_path / "base"))
    assert lora.adapted_layers(model)
    randomized(model)
    (tmp_path / "adapter").mkdir()
    lora.save_adapter(
        model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, tmp_path / "adapter"
    )
    ids = torch.randint(32, (1, 9))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-2)


def test_what_all_linear_leaves_out_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = built(MIXTRAL)
    lora.add_adapter(model, LoraConfig(r=2), "base")
    with caplog.at_level("INFO"):
        lora.log_left_out(model)
    assert caplog.messages == [
        "model.lora: no adapters in model.layers.*.mlp.gate.weight, model.layers.*.mlp.experts.gate_up_proj, "
        "model.layers.*.mlp.experts.down_proj, lm_head.weight"
    ]


def test_adapters_have_the_models_dtype() -> None:
    model = built(LLAMA, torch.bfloat16)
    lora.add_adapter(model, LoraConfig(), "base")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["linear layers", "transposed ones"])
def test_the_merged_tensors_are_the_models_own_names_and_pefts_own_sum(config: Any) -> None:
    model = built(config)
    names = dict(model.named_parameters()).keys()
    lora.add_adapter(model, LoraConfig(r=4, lora_alpha=6), "base")
    randomized(model)
    layers = lora.adapted_layers(model)
    plain = lora.without_adapters(dict(model.named_parameters()), layers)
    assert plain.keys() == names
    merged = {
        name: lora.merge(layers[name], tensor.detach(), *(f.detach() for f in lora.factors_of(layers[name])))
        if name in layers
        else tensor
        for name, tensor in plain.items()
    }
    for layer in layers.values():
        layer.merge()
    for name, tensor in lora.without_adapters(dict(model.named_parameters()), layers).items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name
    assert layers


def test_a_merge_in_bfloat16_rounds_once() -> None:
    model = built(LLAMA, torch.bfloat16)
    lora.add_adapter(model, LoraConfig(r=4, lora_alpha=2), "base")
    layer = next(iter(lora.adapted_layers(randomized(model)).values()))
    weight = layer.base_layer.weight.detach()
    a, b = (factor.detach() for factor in lora.factors_of(layer))
    exact = (weight.double() + 0.5 * (b.double() @ a.double())).float()
    assert torch.equal(lora.merge(layer, weight, a, b), exact.bfloat16())
    twice = weight + (0.5 * (b.float() @ a.float())).bfloat16()
    assert not torch.equal(twice, exact.bfloat16()), "the test needs a sum where it matters"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("lm_head", "LMHead"),
        (["q_proj", "lm_head"], "LMHead"),
        (["embed_tokens"], r"linear layers below the LM head, got model\.embed_tokens"),
        (["q_proj", "query"], "no linear layer 'query'"),
        (["query"], "query"),
        (r".*\.query", "query"),
        ("(", "unterminated"),
        ([], "target_modules"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(targets: str | list[str], message: str) -> None:
    with pytest.raises(InputError, match=rf"model\.lora\.target_modules: .*{message}"):
        lora.add_adapter(built(LLAMA), LoraConfig(target_modules=targets), "base")
    with pytest.raises(InputError, match=r"model\.lora\.target_modules: "):
        trained_parameter_count(ModelConfig(lora=LoraConfig(target_modules=targets)), LLAMA)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (["lm_heads"], "the model has no module 'lm_heads' with weights"),
        (["act_fn"], "the model has no module 'act_fn' with weights"),
        (["embed_tokens", "q_proj"], r"model\.layers\.0\.self_attn\.q_proj holds the adapted layer .*q_proj"),
        (["norm"], r"text does not reach model\.norm\.weight"),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_refused(ends: list[str], message: str) -> None:
    model = built(LLAMA)
    model.model.norm.requires_grad_(False)
    with pytest.raises(InputError, match=rf"^model\.lora\.modules_to_save: {message}"):
        lora.add_adapter(model, LoraConfig(target_modules=["q_proj"], modules_to_save=ends), "base")


def test_targets_leave_out_layers_that_text_does_not_reach() -> None:
    for targets in (["q_proj"], r".*\.q_proj"):
        model = built(LLAMA)
        model.model.layers[0].requires_grad_(False)
        lora.add_adapter(model, LoraConfig(target_modules=targets), "base")
        assert list(lora.adapted_layers(model)) == ["model.layers.1.self_attn.q_proj.weight"]
    model = built(LLAMA).requires_grad_(False)
    with pytest.raises(InputError, match=r"model\.lora\.target_modules: text reaches no layer \['q_proj'\]"):
        lora.add_adapter(model, LoraConfig(target_modules=["q_proj"]), "base")


def test_all_linear_leaves_modules_that_are_trained_whole_alone() -> None:
    model = built(LLAMA)
    lora.add_adapter(model, LoraConfig(modules_to_save=["layers.0.mlp"]), "base")
    whole = {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == whole
    assert not whole & lora.adapted_layers(model).keys()
    assert "model.layers.1.mlp.up_proj.weight" in lora.adapted_layers(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ends", [["lm_head"], ["embed_tokens", "lm_head"], ["norm"]], ids="+".join)
def test_every_library_loads_an_adapter_folder_with_modules_that_were_trained_whole(
    tmp_path: Path, ends: list[str], tied: bool
) -> None:
    base = copy.deepcopy(LLAMA)
    base.tie_word_embeddings, base.vocab_size = tied, 258
    plain = built(base).eval()
    plain.save_pretrained(tmp_path / "base")
    model = copy.deepcopy(plain)
    lora.add_adapter(model, LoraConfig(r=2, modules_to_save=ends), str(tmp_path / "base"))
    randomized(model)
    (tmp_path / "adapter").mkdir()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    lora.save_adapter(model, trained, tmp_path / "adapter")
    settings = ModelConfig(name_or_path=str(tmp_path / "adapter"), dtype="float32")
    loaded = [
        peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "adapter")),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        build_model(settings, model_config(settings, byte_tokenizer())),
    ]
    ids = torch.randint(32, (1, 9))
    assert not torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-2)
    assert all(torch.equal(other.eval()(ids).logits, model(ids).logits) for other in loaded)


def test_a_checkpoint_is_expected_to_take_what_is_trained() -> None:
    adapted = ModelConfig(lora=LoraConfig(r=2, target_modules=["q_proj"]))
    trained = trained_parameter_count(adapted, LLAMA)
    assert trained == 2 * 2 * (16 + 16)
    assert saving.required_bytes(trained, "bfloat16") == trained * 14
    assert trained_parameter_count(ModelConfig(), LLAMA) == sum(p.numel() for p in built(LLAMA).parameters())


def test_an_adapter_folder_is_pefts(tmp_path: Path) -> None:
    model = built(LLAMA)
    lora.add_adapter(model, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"]), str(tmp_path))
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    lora.save_adapter(model, trained, tmp_path)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert config.base_model_name_or_path == str(tmp_path)
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 6, {"q_proj", "down_proj"})
    loaded, own = peft.utils.load_peft_weights(str(tmp_path)), peft.get_peft_model_state_dict(model)
    assert loaded.keys() == {f"base_model.model.{name}" for name in own}
    assert lora.base_of(str(tmp_path)) == str(tmp_path)
    assert lora.base_of("some/hub-id") == "some/hub-id"
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json: expected an adapter's configuration in JSON"):
        lora.base_of(str(tmp_path))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "base").mkdir()
    (tmp_path / "ds.json").write_text("{}")
    return Recipe(
        output_dir=str(tmp_path / "run"),
        deepspeed=str(tmp_path / "ds.json"),
        data=DataConfig(train="builtin:pointer_chase"),
        model=ModelConfig(name_or_path=str(tmp_path / "base"), lora=LoraConfig()),
        train=TrainConfig(max_steps=10, micro_batch_size=1),
    )


@pytest.mark.parametrize(
    ("setting", "value"), [("r", 0), ("lora_alpha", 0), ("lora_dropout", 1.0), ("lora_dropout", -0.1)]
)
def test_invalid_settings_are_refused(recipe: Recipe, setting: str, value: float) -> None:
    assert recipe_problems(recipe) == []
    setattr(recipe.model.lora, setting, value)
    assert [problem.split(":")[0] for problem in recipe_problems(recipe)] == [f"model.lora.{setting}"]


def test_a_model_from_scratch_is_not_adapted(recipe: Recipe) -> None:
    recipe.model.name_or_path, recipe.model.preset, recipe.model.tokenizer = None, {"hidden_size": 8}, "byte"
    assert [problem.split(":")[0] for problem in recipe_problems(recipe)] == ["model.lora"]


def test_an_adapter_folder_is_not_trained_from(recipe: Recipe) -> None:
    (Path(str(recipe.model.name_or_path)) / "adapter_config.json").write_text("{}")
    assert "is an adapter" in recipe_problems(recipe)[0]


def test_the_command_line_makes_and_changes_an_adapter_and_the_resolved_recipe_is_read_back(tmp_path: Path) -> None:
    assert _parse("--config", DEMO).model.lora is None
    arguments = ["--config", DEMO, "--model.lora.r", "4", "--model.lora.target_modules", "[q_proj, v_proj]"]
    recipe = _parse(*arguments)
    assert recipe.model.lora == LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    (tmp_path / "config.yaml").write_text(to_yaml(recipe))
    assert _parse("--config", str(tmp_path / "config.yaml")) == recipe
    changed = _parse("--config", str(tmp_path / "config.yaml"), "--model.lora.export", "adapter").model.lora
    assert changed == LoraConfig(r=4, target_modules=["q_proj", "v_proj"], export="adapter")


def written(recipe: Recipe, **without: list[str]) -> None:
    """Write a run's `config.yaml` and `ds_config.json` as an older version, which lacked some settings, would have."""
    settings = yaml.safe_load(to_yaml(recipe))
    for section, names in without.items():
        for name in names:
            del settings[section][name]
    folder = Path(recipe.output_dir)
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "ds_config.json").write_text("{}")


def test_settings_that_an_older_run_did_not_write_were_at_their_defaults(recipe: Recipe) -> None:
    recipe.model.lora, recipe.resume = None, "auto"
    written(recipe, model=["lora", "attn_implementation"], optim=["epsilon"])
    assert found_by(check_same_run, recipe, {}) == []
    recipe.model.lora, recipe.optim.epsilon = LoraConfig(r=4), 1e-6
    [problem] = found_by(check_same_run, recipe, {})
    assert re.search(r"model\.lora\.r was None and is 4; .*optim\.epsilon was 1e-08 and is 1e-06", problem)


def test_an_adapter_may_not_change_on_resume(recipe: Recipe) -> None:
    recipe.resume = "auto"
    written(recipe)
    assert found_by(check_same_run, recipe, {}) == []
    recipe.model.lora = LoraConfig(export="adapter")  # the form of the export may change
    assert found_by(check_same_run, recipe, {}) == []
    recipe.model.lora = LoraConfig(r=4)
    [problem] = found_by(check_same_run, recipe, {})
    assert "model.lora.r was 8 and is 4" in problem
    recipe.model.lora = None
    [problem] = found_by(check_same_run, recipe, {})
    assert "model.lora.r was 8 and is None" in problem


@pytest.mark.parametrize("names", ["q_proj", "q_proj,v_proj", "q_proj, v_proj"])
def test_a_text_of_names_adapts_the_layers_of_these_names(names: str) -> None:
    model = built(LLAMA)
    lora.add_adapter(model, LoraConfig(target_modules=names), "base")
    found = {part for name, _ in model.named_parameters() if "lora_A" in name for part in name.split(".")}
    assert {name.strip() for name in names.split(",")} == found & {"q_proj", "k_proj", "v_proj", "o_proj"}
