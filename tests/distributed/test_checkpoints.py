"""A run that is killed goes on as if it had not been; what is broken is never loaded."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfgen_ds.config import (
    CheckpointConfig,
    EvalConfig,
    InputError,
    LoraConfig,
    ModelConfig,
    Recipe,
    Source,
    TrainConfig,
    to_yaml,
)
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


@pytest.mark.parametrize("adapted", [False, True])
def test_a_run_killed_at_a_random_moment_ends_with_the_same_model_byte_for_byte(
    two_ranks: Ranks, folder: Path, adapted: bool
) -> None:
    long = TrainConfig(max_steps=60, micro_batch_size=2, gradient_accumulation_steps=2)
    settings = runs.recipe(folder, train=long, checkpoint=CheckpointConfig(every=4))
    if adapted:
        base = runs.write_model(folder, attention_dropout=0.1)
        lora = LoraConfig(r=4, lora_dropout=0.1)
        settings.model = ModelConfig(name_or_path=base, dtype="float32", lora=lora)
    else:
        settings.model.preset = runs.PRESET | {"attention_dropout": 0.1}  # torch's generators matter too
    settings.data.eval, settings.eval = settings.data.train, EvalConfig(every=10, max_samples=4)
    two_ranks.run(runs.run_training, settings)
    whole = weights(settings)
    whole_metrics = runs.metrics(settings)

    killed = folder / "killed"
    settings.output_dir, settings.resume = str(killed), "auto"
    (folder / "recipe.yaml").write_text(to_yaml(settings))
    command = ["train", "--config", str(folder / "recipe.yaml")]
    at_step = random.randrange(6, 50)
    print(f"killed at step {at_step}")
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
    if damage != "no marker":
        assert (newest / checkpoint.BROKEN).exists() or damage == "torn marker"


def test_a_broken_newest_checkpoint_does_not_crowd_out_good_ones(two_ranks: Ranks, saved: Recipe) -> None:
    folder = Path(saved.output_dir) / "checkpoints"
    (folder / "step-000006" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"")
    saved.checkpoint.keep = 1
    assert resume(two_ranks, saved) == 4
    checkpoint.retain(folder, keep=1, metric="loss")
    assert names(saved) == ["step-000004"]
    assert resume_again(two_ranks, saved) == 4


def resume_again(two_ranks: Ranks, settings: Recipe) -> int:
    return two_ranks.run(first_step, settings)[0]


def test_when_every_checkpoint_is_broken_the_run_stops(two_ranks: Ranks, saved: Recipe) -> None:
    for path in (Path(saved.output_dir) / "checkpoints").glob("step-*/generators_rank_0.pt"):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(AssertionError, match="every checkpoint is broken"):
            resume_again(two_ranks, replace(saved, resume="auto"))
    assert len(runs.metrics(saved)) == 6


def test_half_written_folders_are_removed_with_the_next_checkpoint(saved: Recipe) -> None:
    folder = Path(saved.output_dir) / "checkpoints"
    (folder / "step-000005").mkdir()
    checkpoint.retain(folder, keep=3, metric="loss")
    assert not (folder / "step-000005").exists()


def test_a_checkpoint_with_a_damaged_marker_is_not_removed(saved: Recipe) -> None:
    folder = Path(saved.output_dir) / "checkpoints"
    (folder / "step-000002" / checkpoint.MARKER).write_text("{")
    checkpoint.retain(folder, keep=1, metric="loss")
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000002", "step-000006"]


def test_retention_keeps_as_many_as_it_is_told(saved: Recipe) -> None:
    folder = Path(saved.output_dir) / "checkpoints"
    checkpoint.retain(folder, keep=3, metric="loss")
    assert names(saved) == ["step-000002", "step-000004", "step-000006"]


def test_other_rows_are_refused_on_resume(two_ranks: Ranks, saved: Recipe, folder: Path) -> None:
    runs.write_rows(folder, count=41)
    with pytest.raises(AssertionError, match=r"data\.train: not the rows that"):
        resume(two_ranks, saved)


def test_max_steps_may_not_be_lowered_on_resume(two_ranks: Ranks, saved: Recipe) -> None:
    saved.train.max_steps = 5
    with pytest.raises(AssertionError, match=r"train\.max_steps: may be raised on resume, was 6 and is 5"):
        resume(two_ranks, saved)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "float32"), (2, "bfloat16"), (3, "bfloat16")])
def test_every_stage_resumes_and_exports(
    two_ranks: Ranks, folder: Path, stage: int, dtype: Literal["float32", "bfloat16"]
) -> None:
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    found = []
    for stops in ([6], [3, 6]):
        settings = runs.recipe(folder, deepspeed=str(folder / "ds.json"), resume="auto")
        settings.model.dtype, settings.optim.schedule = dtype, "constant"
        for steps in stops:
            settings.train.max_steps = steps
            two_ranks.run(runs.run_training, settings)
        found.append(weights(settings))
    assert found[0] == found[1]
    last = Path(settings.output_dir) / "checkpoints" / "step-000006"
    export.export_checkpoint(last, folder / "exported")
    loaded = [AutoModelForCausalLM.from_pretrained(p) for p in (folder / "exported", f"{settings.output_dir}/model")]
    assert loaded[0].dtype == getattr(torch, dtype)
    assert [model.config.architectures for model in loaded] == [["LlamaForCausalLM"]] * 2
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in loaded), strict=True):
        assert torch.equal(one, other), name
    assert (folder / "exported" / "generation_config.json").exists()


@pytest.mark.parametrize("order", ["packing", "group_by_length", "weights"])
def test_packed_grouped_and_weighted_rows_go_on_where_they_stopped(two_ranks: Ranks, folder: Path, order: str) -> None:
    (folder / "more.jsonl").write_text(json.dumps({"prompt": "other: ", "completion": "row"}) + "\n")
    sources: list[str | Source] = [
        Source(path=str(folder / name), weight=w) for name, w in (("rows.jsonl", 1.0), ("more.jsonl", 1.0))
    ]
    found = []
    for stops in ([6], [3, 6]):
        settings = runs.recipe(folder, resume="auto")
        settings.data.packing, settings.data.group_by_length = order == "packing", order == "group_by_length"
        settings.data.train = sources if order == "weights" else settings.data.train
        settings.optim.schedule = "constant"
        for steps in stops:
            settings.train.max_steps = steps
            two_ranks.run(runs.run_training, settings)
        found.append(weights(settings))
    assert found[0] == found[1]


def test_a_broken_checkpoint_is_not_exported(saved: Recipe, folder: Path) -> None:
    path = Path(saved.output_dir) / "checkpoints" / "step-000006"
    (path / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(InputError, match=r"broken: zero_pp_rank_1_mp_rank_00_optim_states\.pt"):
        export.export_checkpoint(path, folder / "exported")
    assert not (folder / "exported").exists()


def test_a_model_that_lacks_weights_is_refused(two_ranks: Ranks, folder: Path) -> None:
    path = runs.write_model(folder)
    file = Path(path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    settings = runs.recipe(folder, model=ModelConfig(name_or_path=path, dtype="float32"))
    with pytest.raises(AssertionError, match=r"lacks 1 tensors, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        two_ranks.run(runs.run_training, settings)


def test_a_model_is_not_replaced_by_what_is_trained_from_it(two_ranks: Ranks, folder: Path) -> None:
    path = runs.write_model(folder)
    settings = runs.recipe(folder, model=ModelConfig(name_or_path=path, dtype="float32"), output_dir=str(folder))
    with pytest.raises(AssertionError, match=r"is model\.name_or_path, and would be replaced"):
        two_ranks.run(runs.run_training, settings)


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
