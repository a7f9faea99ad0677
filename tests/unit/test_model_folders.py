"""Folders and types of models that are refused, each in one line, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from selfgen_ds.checkpoint import export, source
from selfgen_ds.checkpoint.source import compare_with_source, inspect_source
from selfgen_ds.config import DataConfig, LoraConfig, ModelConfig, Recipe
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError, Problems
from selfgen_ds.model import loading, probe
from selfgen_ds.model.loading import build_model, model_config, warn_of_rounding
from selfgen_ds.model.reach import Reach
from selfgen_ds.validation import inputs
from selfgen_ds.validation.inputs import check_activation_checkpointing, check_quantization
from tests.architectures import CTRL
from tests.distributed import runs

FIELDS: dict[str, tuple[Any, str]] = {
    "hidden_size": ("wide", "Field 'hidden_size' expected int, got str"),
    "num_attention_heads": (3, "not a multiple of the number of attention heads"),
    "num_hidden_layers": (None, "Field 'num_hidden_layers' expected int, got NoneType"),
    "rope_parameters": ({"rope_type": "none"}, "no model can be built from it: KeyError: 'none'"),
    "layer_types": (["round"], "but got ['round']"),
    "dtype": ("float99", "float99"),
    "hidden_act": ("nope", "no model can be built from it: KeyError: 'nope'"),
    "model_type": (7, "does not recognize this architecture"),
    "text_config": (3, "expected a causal language model"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_an_odd_field_of_a_configuration_is_one_line(tmp_path: Path, name: str) -> None:
    path = Path(runs.write_model(tmp_path))
    value, reason = FIELDS[name]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {name: value}))
    settings = ModelConfig(name_or_path=str(path))
    with pytest.raises(InputError) as caught:
        probe.check(settings, model_config(settings, byte_tokenizer()), packing=False)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


GENERATION: dict[str, tuple[str, str]] = {
    "malformed": ("{", "malformed JSON: Expecting property name"),
    "no mapping": ("[1]", "expected a JSON object, got list"),
    "a number in words": ('{"max_new_tokens": "many"}', "not supported between instances of 'str' and 'int'"),
    "a section of another type": ('{"watermarking_config": 3}', "int"),
    "an end token in words": ('{"eos_token_id": "x"}', "expected a token id or a list of them, got 'x'"),
}


@pytest.mark.parametrize("name", GENERATION)
def test_odd_generation_defaults_are_one_line(tmp_path: Path, name: str) -> None:
    path = Path(runs.write_model(tmp_path))
    content, reason = GENERATION[name]
    (path / "generation_config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        model_config(ModelConfig(name_or_path=str(path)), byte_tokenizer())
    assert str(path / "generation_config.json") in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_in_the_folder_is_named_without_a_hub_id_and_code_elsewhere_with_its_own() -> None:
    own = {"AutoConfig": "me/model--configuration_x.X", "AutoTokenizer": ["tokenization_x.X", None]}
    assert {kind: source._in_folder(code, {"configuration_x", "tokenization_x"}) for kind, code in own.items()} == {
        "AutoConfig": "configuration_x.X",
        "AutoTokenizer": ["tokenization_x.X", None],
    }
    assert source._in_folder("me/other--configuration_x.X", {"modeling_x"}) == "me/other--configuration_x.X"


def test_a_tensor_that_transformers_initializes_by_itself_may_be_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(runs.write_model(tmp_path))
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", ["model.norm"])
    settings, problems = ModelConfig(name_or_path=str(path), dtype="float32"), Problems()
    config = model_config(settings, byte_tokenizer())
    with caplog.at_level("INFO"):
        inspect_source(problems, settings, config, Reach(reached={}, routing=[]))
    assert problems.lines == []
    assert "lacks 1 tensors that transformers gives their initial values, the first is model.norm.weight" in caplog.text
    compare_with_source(AutoModelForCausalLM.from_pretrained(path), str(path), reads=True)


def test_a_quantized_model_is_refused_by_its_method(tmp_path: Path) -> None:
    path = Path(runs.write_model(tmp_path))
    config = json.loads((path / "config.json").read_text())
    problems = Problems()
    check_quantization(problems, AutoConfig.from_pretrained(path))
    assert problems.lines == []
    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (path / "config.json").write_text(json.dumps(config | quantized))
    check_quantization(problems, AutoConfig.from_pretrained(path))
    assert problems.lines == [
        "model.name_or_path: the model is quantized (fp8); name an unquantized one, in float32 or bfloat16"
    ]


@pytest.mark.parametrize("asked", [True, False])
def test_a_type_without_activation_checkpointing_is_refused_if_it_is_asked_for(asked: bool) -> None:
    config = AutoConfig.for_model(**CTRL | {"vocab_size": 258, "pad_token_id": 0})
    recipe = Recipe(output_dir="", deepspeed="", data=DataConfig(train=""), model=ModelConfig(preset=CTRL))
    recipe.train.activation_checkpointing = asked
    recipe.model.attn_implementation = "eager"
    problems = Problems()
    check_activation_checkpointing(problems, recipe, probe.check(recipe.model, config, packing=False), config)
    refusal = ["train.activation_checkpointing: expected false: model type 'ctrl' has none"]
    assert problems.lines == (refusal if asked else [])


def test_tensors_that_are_rounded_against_the_model_s_wish_are_named(caplog: pytest.LogCaptureFixture) -> None:
    experts = {"model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}
    config = AutoConfig.for_model(**runs.PRESET | experts | {"vocab_size": 258, "moe_layer_start_index": 1})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    warn_of_rounding(model)
    assert caplog.messages == []
    warn_of_rounding(model.to(torch.bfloat16))
    (line,) = caplog.messages
    assert "to bfloat16 that plain transformers keeps in float32, the first is model.layers.1.mlp.gate.weight;" in line


def test_a_rank_that_cannot_read_the_folder_gathers_every_tensor_before_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(runs.write_model(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(path)
    gathered: list[Tensor] = []
    monkeypatch.setattr(source, "gather_copy", lambda tensor, reads: gathered.append(tensor))
    compare_with_source(model, str(path), reads=False)
    others = len(gathered)
    (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        compare_with_source(model, str(path), reads=True)
    assert len(gathered) == 2 * others > 0


def test_a_tensor_that_was_not_loaded_as_it_is_in_the_folder_is_named(tmp_path: Path) -> None:
    path = runs.write_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    compare_with_source(model, path, reads=True)
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    compare_with_source(model, path, reads=False)
    with pytest.raises(InputError, match=r"model\.norm\.weight was not loaded as it is there"):
        compare_with_source(model, path, reads=True)


@pytest.mark.parametrize(("rank", "part"), [(0, [1.0, 2.0]), (1, [1.0]), (2, [])])
def test_the_padding_of_a_shard_is_not_taken_for_a_weight(rank: int, part: list[float]) -> None:
    shard = torch.tensor([1.0, 2.0 if rank == 0 else torch.inf])
    shard.ds_numel = 2  # type: ignore[attr-defined]
    parameter = SimpleNamespace(ds_tensor=shard, ds_numel=3, ds_zero_partition_rank=rank)
    assert export._own_part(parameter).tolist() == part


def test_a_model_that_transformers_cannot_build_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise IndexError("tuple index\nout of range")

    model = ModelConfig(name_or_path=runs.write_model(tmp_path), dtype="float32")
    config = model_config(model, byte_tokenizer())
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(InputError) as caught:
        build_model(model, config)
    assert str(caught.value) == (
        "model: model type 'llama': transformers cannot build it: IndexError: tuple index out of range"
    )


def test_a_learning_rate_of_a_model_from_scratch_is_named_for_a_pretrained_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = runs.recipe(tmp_path)
    config = model_config(recipe.model, byte_tokenizer())
    pretrained = ModelConfig(name_or_path=runs.write_model(tmp_path), dtype="float32")
    for model, rate, size, said in [
        (recipe.model, 1e-3, 0, False),
        (pretrained, 1e-3, 10**9, False),
        (pretrained, 1e-4, 0, False),
        (pretrained, 1e-3, 0, True),
        (replace(pretrained, lora=LoraConfig()), 1e-3, 0, False),
        (replace(pretrained, lora=LoraConfig()), 5e-3, 0, True),
    ]:
        caplog.clear()
        monkeypatch.setattr(inputs, "_SMALL_MODEL", size)
        recipe.model, recipe.optim.learning_rate = model, rate
        inputs.warn_of_learning_rate(recipe, config)
        assert ("suits a model from scratch" in caplog.text) == said
