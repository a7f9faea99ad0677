"""Check larger tokenizers, models of several files, and mixtures of experts under ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from selfgen_ds.checkpoint import export
from selfgen_ds.config import ModelConfig, Recipe, TrainConfig
from selfgen_ds.setup.prepare import prepare
from tests.architectures import ARCHITECTURES
from tests.distributed import runs
from tests.distributed.test_equivalence import assert_same_tensors, stored
from tests.ranks import Ranks
from tests.tiers import matrix


def saved(folder: Path, name: str, dtype: str = "float32", **changes: object) -> ModelConfig:
    path = runs.write_model_of(folder, ARCHITECTURES[name] | changes)
    return ModelConfig(name_or_path=path, tokenizer="byte", dtype=dtype)  # type: ignore[arg-type]


def parameters_and_export(settings: Recipe) -> dict[str, torch.Tensor]:
    """Return the parameters at the start, then run two steps and export the model."""
    run = prepare(settings, set())
    parameters = {name: runs.whole(parameter) for name, parameter in run.engine.module.named_parameters()}
    runs.steps(run, 2)
    runs.export(run, Path(settings.output_dir) / "model")
    return parameters


@matrix(("name", "stage"), [("llama, tied", 2), ("llama, tied", 3), ("phi", 3)])  # phi has a head bias
def test_embeddings_grow_for_a_larger_tokenizer_alike_on_all_ranks(
    two_ranks: Ranks, folder: Path, name: str, stage: int
) -> None:
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    settings = runs.recipe(folder, deepspeed=str(folder / "ds.json"), model=saved(folder, name, vocab_size=200))
    with pytest.raises(AssertionError, match=r"258 ids, .* embeddings for 200; model\.resize_embeddings=true"):
        two_ranks.run(parameters_and_export, settings)
    settings.model.resize_embeddings = True
    one, other = two_ranks.run(parameters_and_export, settings)
    assert_same_tensors(one, other)
    old = dict(AutoModelForCausalLM.from_pretrained(settings.model.name_or_path).named_parameters())
    assert one.keys() == old.keys()
    grown = [n for n in one if one[n].shape != old[n].shape]
    assert set(grown) == {n for n in old if len(old[n]) == 200}
    for parameter in grown:
        assert torch.equal(one[parameter][:200], old[parameter])
        mean = old[parameter].mean(dim=0).expand_as(one[parameter][200:])
        torch.testing.assert_close(one[parameter][200:], mean, rtol=1e-5, atol=1e-7)
    exported = Path(settings.output_dir) / "model"
    assert AutoConfig.from_pretrained(exported).vocab_size == 258
    trained = AutoModelForCausalLM.from_pretrained(exported)
    assert trained.get_input_embeddings().weight.shape[0] == trained.get_output_embeddings().weight.shape[0] == 258


def export_in_small_shards(settings: Recipe) -> None:
    """Run one step at a learning rate of 0, then export the model and save a checkpoint."""
    run = prepare(settings, set())
    runs.steps(run, 1)
    folder = Path(settings.output_dir)
    before, export.MAX_SHARD = export.MAX_SHARD, "30KB"
    try:
        runs.export(run, folder / "engine")
        runs.save(run, settings, 1)
    finally:
        export.MAX_SHARD = before


@matrix("name", ["mixtral", "gpt2"])
def test_a_folder_of_many_files_goes_out_as_it_came_in_in_bfloat16_too(
    two_ranks: Ranks, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(folder, name, "bfloat16")
    source = Path(str(model.name_or_path))
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    (source / "model.safetensors").unlink()
    plain.save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    settings = runs.recipe(folder, model=model)
    settings.optim.learning_rate = 0.0
    two_ranks.run(export_in_small_shards, settings)
    output = Path(settings.output_dir)
    monkeypatch.setattr(export, "MAX_SHARD", "30KB")
    export.export_checkpoint(output / "checkpoints" / "step-000001", output / "checkpoint")
    plain.save_pretrained(folder / "plain", max_shard_size="30KB")
    expected = sorted(path.name for path in (folder / "plain").glob("*.safetensors"))
    for exported in ("engine", "checkpoint"):
        path = output / exported
        assert sorted(file.name for file in path.glob("*.safetensors")) == expected
        assert_same_tensors(stored(source), stored(path))
        assert_same_tensors(
            dict(plain.state_dict()),
            dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()),
        )


def test_experts_are_trained_when_a_rank_has_run_out_of_rows(two_ranks: Ranks, tmp_path: Path) -> None:
    runs.write_rows(tmp_path, count=9)  # a step takes 8 rows: the second step has one, on rank 0
    model = ModelConfig(preset=ARCHITECTURES["mixtral"], tokenizer="byte", dtype="float32")
    settings = runs.recipe(
        tmp_path, model=model, train=TrainConfig(epochs=1, micro_batch_size=2, gradient_accumulation_steps=2)
    )
    two_ranks.run(runs.run_training, settings, timeout=60.0)
    first, second = runs.metrics(settings)
    assert 1.0 < first["router_loss"] < 4.0  # a token goes to 2 of 4 experts: 2 if all are used equally
    assert 1.0 < second["router_loss"] < 4.0  # the mean over the one micro-batch with tokens
    assert [row["dropped"] for row in (first, second)] == [0, 0]
    assert second["epoch"] == 1.0
