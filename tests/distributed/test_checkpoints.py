"""A run that is killed goes on as if it had not been; what is broken is never loaded."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import time
import zlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfgen_ds.config import CheckpointConfig, EvalConfig, Recipe, TrainConfig, to_yaml
from selfgen_ds.engine import checkpoint, export
from tests.distributed import runs
from tests.ranks import Ranks, deepspeed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs.write_rows(tmp_path)
    return tmp_path


def weights(settings: Recipe) -> bytes:
    return (Path(settings.output_dir) / "model" / "model.safetensors").read_bytes()


def names(settings: Recipe) -> list[str]:
    return [c.path.name for c in checkpoint.complete_checkpoints(Path(settings.output_dir) / "checkpoints")]


def test_a_run_killed_at_a_random_moment_ends_with_the_same_model_byte_for_byte(two_ranks: Ranks, folder: Path) -> None:
    long = TrainConfig(max_steps=60, micro_batch_size=2, gradient_accumulation_steps=2)
    settings = runs.recipe(folder, train=long, checkpoint=CheckpointConfig(every=4))
    settings.data.eval, settings.eval = settings.data.train, EvalConfig(every=10, max_samples=4)
    two_ranks.run(runs.run_training, settings)
    whole = weights(settings)
    whole_metrics = runs.metrics(settings)

    killed = folder / "killed"
    settings.output_dir, settings.resume = str(killed), "auto"
    (folder / "recipe.yaml").write_text(to_yaml(settings))
    command = ["train", "--config", str(folder / "recipe.yaml")]
    at_step = random.Random(folder.name).randrange(6, 50)
    with deepspeed(command, folder / "log") as run:
        while (lines := count_lines(killed / "metrics.jsonl")) < at_step:
            assert run.process.poll() is None, run.output()[-3000:]
            assert time.monotonic() < run.deadline
            time.sleep(0.01)
    assert 0 < lines < 60
    assert not (killed / "model").exists()
    with deepspeed(command, folder / "log") as run:
        assert run.wait() == 0, run.output()[-3000:]
    assert "resumed from" in run.output()
    assert weights(settings) == whole
    timed = {"step_time_s", "pass_time_s", "tokens_per_second", "peak_memory_bytes"}
    resumed_metrics = runs.metrics(settings)
    assert [{k: v for k, v in row.items() if k not in timed} for row in resumed_metrics] == [
        {k: v for k, v in row.items() if k not in timed} for row in whole_metrics
    ]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture
def saved(two_ranks: Ranks, folder: Path) -> Recipe:
    """A run of 6 steps saved at 2, 4 and 6."""
    settings = runs.recipe(folder, checkpoint=CheckpointConfig(every=2, keep=3))
    settings.train.max_steps = 6
    two_ranks.run(runs.run_training, settings)
    return settings


def resume(two_ranks: Ranks, settings: Recipe) -> int:
    """Resume; the step that the run went on from."""
    shutil.rmtree(Path(settings.output_dir) / "model")
    settings.resume = "auto"
    return two_ranks.run(first_step, settings)[0]


def first_step(settings: Recipe) -> int:
    from selfgen_ds.prepare import prepare

    return prepare(settings, set()).first_step


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing file", "no marker", "torn marker"])
def test_a_broken_newest_checkpoint_is_passed_over(two_ranks: Ranks, saved: Recipe, damage: str) -> None:
    newest = Path(saved.output_dir) / "checkpoints" / "step-000006"
    states = newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = states.read_bytes()
    if damage == "truncated":
        states.write_bytes(content[:-1])
    elif damage == "flipped":
        middle = len(content) // 2
        states.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "missing file":
        states.unlink()
    elif damage == "no marker":
        (newest / checkpoint.MARKER).unlink()
    else:
        (newest / checkpoint.MARKER).write_text((newest / checkpoint.MARKER).read_text()[:20])
    assert resume(two_ranks, saved) == 4


def test_with_no_usable_checkpoint_a_run_starts_from_the_beginning(two_ranks: Ranks, saved: Recipe) -> None:
    for path in (Path(saved.output_dir) / "checkpoints").glob("step-*"):
        (path / checkpoint.MARKER).unlink()
    assert resume(two_ranks, saved) == 0


def test_a_finished_run_exports_again_and_trains_no_further(two_ranks: Ranks, saved: Recipe) -> None:
    before, lines = weights(saved), len(runs.metrics(saved))
    saved.resume = "auto"
    two_ranks.run(runs.run_training, saved)
    assert (weights(saved), len(runs.metrics(saved))) == (before, lines)


def test_max_steps_may_be_raised_on_resume(two_ranks: Ranks, saved: Recipe) -> None:
    saved.train.max_steps, saved.resume = 8, "auto"
    two_ranks.run(runs.run_training, saved)
    assert [row["step"] for row in runs.metrics(saved)] == list(range(1, 9))


def test_another_setting_may_not_change_on_resume(two_ranks: Ranks, saved: Recipe) -> None:
    saved.seed, saved.resume = 4, "auto"
    with pytest.raises(AssertionError, match="seed was 3 and is 4"):
        two_ranks.run(runs.run_training, saved)


def test_another_world_size_is_refused(one_rank: Ranks, saved: Recipe) -> None:
    saved.resume = "auto"
    with pytest.raises(AssertionError, match="written by 2 ranks and cannot be resumed on 1"):
        one_rank.run(runs.run_training, saved)


def test_the_newest_and_the_best_checkpoints_are_kept(two_ranks: Ranks, folder: Path) -> None:
    settings = runs.recipe(folder, checkpoint=CheckpointConfig(every=2, keep=1))
    settings.optim.learning_rate, settings.optim.schedule = 1.0, "constant"  # learns nothing
    settings.data.eval, settings.eval = settings.data.train, EvalConfig(every=1, max_samples=8)
    settings.train.max_steps = 8
    two_ranks.run(runs.run_training, settings)
    losses = {int(row["step"]): row["eval_loss"] for row in runs.metrics(settings)}
    best = min(losses, key=lambda step: losses[step])
    assert names(settings) == sorted({f"step-{best:06d}", "step-000008"})
    assert best not in (7, 8), "the test needs a best step that is not the last"


def test_code_in_a_checkpoint_is_not_run(two_ranks: Ranks, saved: Recipe) -> None:
    newest = Path(saved.output_dir) / "checkpoints" / "step-000006"
    states = newest / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save(Exploit(str(newest / "executed")), states)
    marker = json.loads((newest / checkpoint.MARKER).read_text())
    marker["files"][0][states.name] = [states.stat().st_size, zlib.crc32(states.read_bytes())]
    (newest / checkpoint.MARKER).write_text(json.dumps(marker))
    with pytest.raises(AssertionError, match=pickle.UnpicklingError.__name__):
        resume(two_ranks, saved)
    assert not (newest / "executed").exists()


class Exploit:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("tied", [False, True])
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
