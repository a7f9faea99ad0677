"""The exported model is the one that was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfgen_ds.checkpoint import export
from selfgen_ds.config import Recipe
from selfgen_ds.errors import InputError
from tests.distributed import runs
from tests.ranks import Ranks


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.check), True])
def test_the_exported_model_is_what_was_trained(two_ranks: Ranks, folder: Path, tied: bool) -> None:
    settings = runs.recipe(folder)
    settings.model.preset = runs.PRESET | {"tie_word_embeddings": tied}
    two_ranks.run(runs.run_training, settings)
    run = Path(settings.output_dir)
    export.export_checkpoint(run / "checkpoints" / "step-000004", folder / "exported")
    loaded = [AutoModelForCausalLM.from_pretrained(path) for path in (run / "model", folder / "exported")]
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in loaded), strict=True):
        assert torch.equal(one, other), name
    assert loaded[0].config.tie_word_embeddings == tied
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    prompt = tokenizer("row 1: ", return_tensors="pt")
    answers = [model.generate(**prompt, max_new_tokens=5, do_sample=False) for model in loaded]
    assert torch.equal(*answers)


def test_a_large_model_is_exported_in_shards(
    two_ranks: Ranks, saved: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_SHARD", "50KB")
    export.export_checkpoint(Path(saved.output_dir) / "checkpoints" / "step-000006", folder / "exported")
    assert len(list((folder / "exported").glob("*.safetensors"))) > 2
    loaded = [AutoModelForCausalLM.from_pretrained(p) for p in (folder / "exported", f"{saved.output_dir}/model")]
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in loaded), strict=True):
        assert torch.equal(one, other), name


def test_a_model_that_was_not_trained_comes_out_as_it_went_in(two_ranks: Ranks, folder: Path) -> None:
    path = runs.write_model(folder)
    settings = runs.recipe(folder)
    settings.model.name_or_path, settings.model.preset, settings.model.tokenizer = path, None, None
    settings.optim.learning_rate = 0.0
    two_ranks.run(runs.run_training, settings)
    loaded = [AutoModelForCausalLM.from_pretrained(p) for p in (path, f"{settings.output_dir}/model")]
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in loaded), strict=True):
        assert torch.equal(one, other), name


def test_a_broken_checkpoint_is_not_exported(saved: Recipe, folder: Path) -> None:
    path = Path(saved.output_dir) / "checkpoints" / "step-000006"
    (path / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(InputError, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt: not as written"):
        export.export_checkpoint(path, folder / "exported")
    assert not (folder / "exported").exists()


def test_the_folder_of_a_run_is_answered_with_its_newest_checkpoint(saved: Recipe, folder: Path) -> None:
    newest = f"its newest checkpoint is {saved.output_dir}/checkpoints/step-000006"
    with pytest.raises(InputError, match=f"{saved.output_dir}: expected a checkpoint, got a run; {newest}$"):
        export.export_checkpoint(Path(saved.output_dir), folder / "exported")
