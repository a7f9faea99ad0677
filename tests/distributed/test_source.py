"""A model's folder: loaded as plain transformers loads it, and nothing of it is lost on the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from selfgen_ds.checkpoint.export import export_checkpoint
from selfgen_ds.config import LoraConfig, ModelConfig, Recipe
from selfgen_ds.errors import InputError
from selfgen_ds.setup.prepare import prepare
from tests.distributed import runs
from tests.ranks import Ranks
from tests.remote_code import write_list_moe
from tests.sources import SOURCES, tensors, write
from tests.tiers import matrix

NOT_TRAINED = {
    "more layers than the model has": ("model.layers.1.",),
    "a vision tower that the text model does not take": ("model.visual.",),
    "experts beside a vision tower": ("vision_model.", "multi_modal_projector."),
    "a vision tower that text does not reach": ("vision_tower.", "multi_modal_projector."),
}


def recipe(folder: Path, source: Path, stage: int) -> Recipe:
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    model = ModelConfig(name_or_path=str(source), tokenizer="byte", dtype="float32", attn_implementation="eager")
    return runs.recipe(folder, deepspeed=str(folder / "ds.json"), model=model)


def loss_and_exports(settings: Recipe) -> float:
    """Run two steps, save a checkpoint and export. Return the loss of the first step."""
    run = prepare(settings, set())
    results, _ = runs.steps(run, 2)
    runs.save(run, settings, 2)
    runs.export(run, Path(settings.output_dir) / "model")
    return results[0].loss


def plain_loss(settings: Recipe, source: Path) -> float:
    """Return the loss of the first step, by plain transformers in one process."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in runs.micro_batches_of(settings, runs.samples_of(settings), 0):
            logits = model(batch.context_ids).logits[:, :-1]
            mask, targets = batch.loss_mask[:, 1:], batch.target_ids[:, 1:]
            total += float(torch.nn.functional.cross_entropy(logits[mask], targets[mask], reduction="sum"))
            count += int(mask.sum())
    return total / count


@matrix(
    ("kind", "stage"),
    [
        *((kind, 3) for kind in SOURCES),
        ("a head of its own under tied embeddings", 0),
        ("more layers than the model has", 2),
        ("names without the backbone's prefix", 0),
        ("a vision tower that text does not reach", 2),
    ],
)
def test_a_folder_is_loaded_as_plain_transformers_does_and_goes_out_whole(
    two_ranks: Ranks, folder: Path, kind: str, stage: int
) -> None:
    source = SOURCES[kind](folder)
    settings = recipe(folder, source, stage)
    settings.selfgen = runs.SFT
    losses = two_ranks.run(loss_and_exports, settings)
    assert losses == [pytest.approx(plain_loss(settings, source), rel=1e-5)] * 2
    output = Path(settings.output_dir)
    export_checkpoint(output / "checkpoints" / "step-000002", output / "exported")
    before, after = tensors(source), tensors(output / "model")
    if kind == "the embeddings twice":
        del before["lm_head.weight"]
    assert after.keys() == before.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(NOT_TRAINED.get(kind, ()))}
    exported = tensors(output / "exported")
    assert exported.keys() == after.keys()
    assert all(torch.equal(exported[name], after[name]) for name in after)
    for path in (output / "model", output / "exported"):
        assert type(AutoConfig.from_pretrained(path)) is type(AutoConfig.from_pretrained(source))
        _, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not report["missing_keys"]


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_head_that_the_folder_has(two_ranks: Ranks, folder: Path) -> None:
    source = SOURCES["a head of its own under tied embeddings"](folder)
    settings = recipe(folder, source, 3)
    settings.model.lora = LoraConfig(r=2, target_modules=["q_proj"])
    two_ranks.run(loss_and_exports, settings)
    output = Path(settings.output_dir)
    export_checkpoint(output / "checkpoints" / "step-000002", output / "exported")
    before, after, exported = map(tensors, (source, output / "model", output / "exported"))
    assert before.keys() == after.keys() == exported.keys()
    assert all(torch.equal(after[name], exported[name]) for name in after)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    }


def prepare_only(settings: Recipe) -> None:
    prepare(settings, set())


@matrix("stage", [3, 0])
def test_missing_and_reshaped_tensors_are_all_named_before_the_data_are_read(
    two_ranks: Ranks, folder: Path, stage: int
) -> None:
    source = Path(runs.write_model(folder))
    content = tensors(source)
    del content["model.layers.1.mlp.up_proj.weight"]
    content["model.norm.weight"] = torch.ones(31)
    write(source, content)
    with pytest.raises(AssertionError) as raised:
        two_ranks.run(prepare_only, recipe(folder, source, stage))
    assert "lacks 1 tensors, the first is model.layers.1.mlp.up_proj.weight" in str(raised.value)
    assert "1 tensors of another shape, the first is model.norm.weight, whose shape is [31] there and [32]" in str(
        raised.value
    )


@matrix("kind", ["a vision tower that text does not reach", "a head of its own under tied embeddings"])
def test_a_resumed_run_ends_with_the_same_bits(two_ranks: Ranks, folder: Path, kind: str) -> None:
    settings = recipe(folder, SOURCES[kind](folder), 3)
    settings.checkpoint.every, settings.checkpoint.keep = 2, 9
    two_ranks.run(runs.run_training, settings)
    output = Path(settings.output_dir)
    whole = runs.weights(settings)
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step-000004")
    settings.resume = "auto"
    two_ranks.run(runs.run_training, settings)
    assert runs.weights(settings) == whole


def test_a_model_with_its_own_code_goes_out_with_it(two_ranks: Ranks, folder: Path) -> None:
    source = write_list_moe(folder)
    settings = recipe(folder, source, 3)
    settings.model.trust_remote_code, settings.model.tokenizer = True, None
    two_ranks.run(loss_and_exports, settings)
    output = Path(settings.output_dir)
    checkpoint = output / "checkpoints" / "step-000002"
    with pytest.raises(InputError, match="brings its own code; --trust_remote_code true lets it run"):
        export_checkpoint(checkpoint, output / "exported")
    export_checkpoint(checkpoint, output / "exported", trust_remote_code=True)
    source.rename(folder / "moved")  # the exported folders need no other
    ids = torch.arange(9)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)(ids).logits
        for path in (output / "model", output / "exported")
    ]
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(output / "model", trust_remote_code=False)


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_adapters_are_exported_in_any_form_from_any_checkpoint(two_ranks: Ranks, folder: Path, form: str) -> None:
    source = Path(runs.write_model(folder))
    settings = recipe(folder, source, 3)
    settings.model.lora = LoraConfig(r=2, export="adapter" if form == "merged" else "merged")
    two_ranks.run(loss_and_exports, settings)
    output = Path(settings.output_dir)
    export_checkpoint(output / "checkpoints" / "step-000002", output / "exported", lora_export=form)  # type: ignore[arg-type]
    assert (output / "exported" / "adapter_config.json").exists() == (form == "adapter")
    ids = torch.arange(9)[None]
    one, other = (
        AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (output / "model", output / "exported")
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
