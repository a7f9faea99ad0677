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


@pytest.mark.check
def test_the_exported_model_is_what_was_trained(two_ranks: Ranks, folder: Path) -> None:
    settings = runs.recipe(folder)
    two_ranks.run(runs.run_training, settings)
    run = Path(settings.output_dir)
    export.export_checkpoint(run / "checkpoints" / "step-000004", folder / "exported")
    loaded = [AutoModelForCausalLM.from_pretrained(path) for path in (run / "model", folder / "exported")]
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in loaded), strict=True):
        assert torch.equal(one, other), name
    assert not loaded[0].config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    prompt = tokenizer("row 1: ", return_tensors="pt")
    answers = [model.generate(**prompt, max_new_tokens=5, do_sample=False) for model in loaded]
    assert torch.equal(*answers)


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
