"""A run that is killed goes on as if it had not been; what is broken is never loaded."""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from selfgen_ds.checkpoint import checkpoint, export
from selfgen_ds.config import (
    CheckpointConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    Recipe,
    Source,
    TrainConfig,
    to_yaml,
)
from selfgen_ds.ranks.storage import Storage
from selfgen_ds.setup.prepare import prepare
from tests.distributed import runs
from tests.forked import Run
from tests.ranks import Ranks


def names(settings: Recipe) -> list[str]:
    return [c.path.name for c in checkpoint.complete_checkpoints(Path(settings.output_dir) / "checkpoints")]


@pytest.mark.parametrize("adapted", [False, True])
def test_a_run_killed_at_a_random_moment_ends_with_the_same_model_byte_for_byte(
    two_ranks: Ranks, folder: Path, adapted: bool
) -> None:
    long = TrainConfig(max_steps=30, micro_batch_size=2, gradient_accumulation_steps=2)
    settings = runs.recipe(folder, train=long, checkpoint=CheckpointConfig(every=4))
    if adapted:
        base = runs.write_model(folder, attention_dropout=0.1)
        lora = LoraConfig(r=4, lora_dropout=0.1)
        settings.model = ModelConfig(name_or_path=base, dtype="float32", lora=lora)
    else:
        settings.model.preset = runs.PRESET | {"attention_dropout": 0.1}  # torch's generators matter too
    settings.data.eval, settings.eval = settings.data.train, EvalConfig(every=10, max_samples=4)
    two_ranks.run(runs.run_training, settings)
    whole = runs.weights(settings)
    whole_metrics = runs.untimed(settings)

    killed = folder / "killed"
    settings.output_dir, settings.resume = str(killed), "auto"
    (folder / "recipe.yaml").write_text(to_yaml(settings))
    arguments = ["train", "--config", str(folder / "recipe.yaml")]
    at_step = random.randrange(6, 24)
    print(f"killed at step {at_step}")
    run = Run(arguments, folder)
    run.until(lambda: runs.count_lines(killed / "metrics.jsonl") >= at_step)
    run.kill()
    assert runs.count_lines(killed / "metrics.jsonl") < 30
    assert not (killed / "model").exists()
    run = Run(arguments, folder)
    assert run.wait() == [0, 0], run.output(0)[-3000:]
    assert "resumed from" in run.output(0)
    assert runs.weights(settings) == whole
    assert runs.untimed(settings) == whole_metrics


def resume(two_ranks: Ranks, settings: Recipe) -> int:
    """Resume; the step that the run went on from."""
    shutil.rmtree(Path(settings.output_dir) / "model")
    settings.resume = "auto"
    return two_ranks.run(runs.first_step, settings)[0]


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
    two_ranks.run(retain, folder, 1)
    assert names(saved) == ["step-000004"]
    assert resume_again(two_ranks, saved) == 4


def retain(folder: Path, keep: int) -> None:
    checkpoint.retain(folder, keep, "loss", Storage(shared=True, writes=dist.get_rank() == 0))


@pytest.mark.parametrize("damaged", [["step-000006"], ["step-000006", "step-000004"]])
def test_older_checkpoints_are_not_removed_for_a_newest_one_that_is_broken(
    two_ranks: Ranks, saved: Recipe, damaged: list[str]
) -> None:
    folder = Path(saved.output_dir) / "checkpoints"
    for name in damaged:
        (folder / name / "generators_rank_1.pt").write_bytes(b"")
    two_ranks.run(retain, folder, 1)
    intact = "step-000002" if len(damaged) == 2 else "step-000004"
    assert names(saved) == [intact]
    assert sorted(path.name for path in folder.glob("step-*")) == sorted({intact, *damaged})
    assert resume(two_ranks, saved) == int(intact[-1])


def test_nothing_is_removed_where_no_checkpoint_is_intact(two_ranks: Ranks, saved: Recipe) -> None:
    folder = Path(saved.output_dir) / "checkpoints"
    for path in folder.glob("step-*/generators_rank_1.pt"):
        path.write_bytes(b"")
    two_ranks.run(retain, folder, 1)
    assert names(saved) == ["step-000002", "step-000004", "step-000006"]


def test_a_step_that_is_saved_already_is_not_written_again(two_ranks: Ranks, folder: Path) -> None:
    """Were it, there would be no checkpoint meanwhile if it is the only one."""
    settings = runs.recipe(folder)
    assert two_ranks.run(saved_twice, settings)[0] == [True, True]


def saved_twice(settings: Recipe) -> list[bool]:
    """Whether the files and the marker of a step stay as they are."""
    run = prepare(settings, set())
    runs.steps(run, 1)
    seen = []
    for _ in range(2):
        runs.save(run, settings, 1)
        files = sorted((Path(settings.output_dir) / "checkpoints" / "step-000001").rglob("*"))
        seen.append([(path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in files])
    return [seen[0] == seen[1], len(seen[0]) > 8]


class Killed(BaseException):
    """In the place of a SIGKILL: what has been done to files until then stays."""


_MOMENTS: dict[str, int | None] = {"left": None}  # file operations until a kill; the hook below stays in the process


def _count(event: str, arguments: tuple[Any, ...]) -> None:
    if _MOMENTS["left"] is None or event not in _OPERATIONS:
        return
    if event == "open" and not (isinstance(arguments[1], str) and arguments[1].startswith(("w", "x"))):
        return
    _MOMENTS["left"] -= 1
    if _MOMENTS["left"] < 0:
        _MOMENTS["left"] = None
        raise Killed


_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "torch.save"}


def steps_after_kills(settings: Recipe) -> list[int]:
    """With one checkpoint kept, die at every file operation of saving the next one and removing the first.

    Returns:
        The step of the newest intact checkpoint after each.
    """
    run = prepare(settings, set())
    folder = Path(settings.output_dir) / "checkpoints"
    runs.steps(run, 1)
    runs.save(run, settings, 1)
    shutil.copytree(folder, folder.with_name("first"))
    sys.addaudithook(_count)
    found: list[int] = []
    write = torch.save
    with pytest.MonkeyPatch.context() as patch:

        def audited(*arguments: Any, **settings: Any) -> None:
            _count("torch.save", ())  # it opens files where Python does not see it
            write(*arguments, **settings)

        patch.setattr(torch, "save", audited)
        while True:
            shutil.rmtree(folder)
            shutil.copytree(folder.with_name("first"), folder)
            done = False
            _MOMENTS["left"] = len(found)
            try:
                runs.save(run, settings, 2)
                checkpoint.retain(folder, 1, "loss", run.folder.storage)
                done = True
            except Killed:
                pass
            _MOMENTS["left"] = None
            newest = checkpoint.find(folder, run.folder.storage)
            assert newest is not None
            found.append(newest.step)
            left = [path.name for path in folder.glob("step-*")]
            assert len(left) == len(checkpoint.complete_checkpoints(folder)), "what is half-written is removed"
            if done:
                assert left == ["step-000002"]
                return found


def test_a_save_that_is_killed_anywhere_leaves_an_intact_checkpoint(one_rank: Ranks, folder: Path) -> None:
    settings = runs.recipe(folder)
    found = one_rank.run(steps_after_kills, settings)[0]
    assert found == sorted(found)
    assert found.count(1) > 10, "kills before it is complete"
    assert found.count(2) > 10, "kills while the older one is removed"


def resume_again(two_ranks: Ranks, settings: Recipe) -> int:
    return two_ranks.run(runs.first_step, settings)[0]


def test_when_every_checkpoint_is_broken_the_run_stops(two_ranks: Ranks, saved: Recipe) -> None:
    for path in (Path(saved.output_dir) / "checkpoints").glob("step-*/generators_rank_0.pt"):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(AssertionError, match="every checkpoint is broken"):
            resume_again(two_ranks, replace(saved, resume="auto"))
    assert len(runs.metrics(saved)) == 6


def test_half_written_folders_are_removed_and_those_of_other_names_are_not(two_ranks: Ranks, saved: Recipe) -> None:
    folder = Path(saved.output_dir) / "checkpoints"
    (folder / "step-000005").mkdir()
    (folder / "step-000006-exported").mkdir()
    two_ranks.run(retain, folder, 3)
    assert not (folder / "step-000005").exists()
    (folder / "step-000005").mkdir()
    assert resume(two_ranks, saved) == 6
    assert not (folder / "step-000005").exists()
    assert (folder / "step-000006-exported").exists()


def test_a_checkpoint_with_a_damaged_marker_is_not_removed(two_ranks: Ranks, saved: Recipe) -> None:
    folder = Path(saved.output_dir) / "checkpoints"
    (folder / "step-000002" / checkpoint.MARKER).write_text("{")
    two_ranks.run(retain, folder, 1)
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000002", "step-000006"]


@pytest.mark.parametrize("change", ["another step", "fewer files", "no checksum", "no object"])
def test_a_marker_that_can_be_read_but_is_not_as_it_was_written_does_not_count(saved: Recipe, change: str) -> None:
    marker = Path(saved.output_dir) / "checkpoints" / "step-000006" / checkpoint.MARKER
    content = json.loads(marker.read_text())
    if change == "another step":
        content["step"] = 7
    elif change == "fewer files":
        content["files"].pop()
    elif change == "no checksum":
        del content["crc32"]
    marker.write_text("6" if change == "no object" else json.dumps(content))
    assert names(saved) == ["step-000002", "step-000004"]


def test_retention_keeps_as_many_as_it_is_told(two_ranks: Ranks, saved: Recipe) -> None:
    two_ranks.run(retain, Path(saved.output_dir) / "checkpoints", 3)
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
        found.append(runs.weights(settings))
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
        found.append(runs.weights(settings))
    assert found[0] == found[1]


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


def test_a_folder_that_could_not_be_resumed_is_refused(one_rank: Ranks, folder: Path) -> None:
    settings = runs.recipe(folder, output_dir=str(folder / "lr[1e-2]"))
    with pytest.raises(AssertionError, match=r"InputError: output_dir: expected none of \*\?\[ in '.*lr\[1e-2\]'"):
        one_rank.run(runs.first_step, settings)


def test_with_no_usable_checkpoint_a_run_starts_from_the_beginning(two_ranks: Ranks, saved: Recipe) -> None:
    for path in (Path(saved.output_dir) / "checkpoints").glob("step-*"):
        (path / checkpoint.MARKER).unlink()
    assert resume(two_ranks, saved) == 0


def test_a_finished_run_exports_again_and_trains_no_further(two_ranks: Ranks, saved: Recipe) -> None:
    before, lines = runs.weights(saved), len(runs.metrics(saved))
    saved.resume = "auto"
    two_ranks.run(runs.run_training, saved)
    assert (runs.weights(saved), len(runs.metrics(saved))) == (before, lines)


def test_max_steps_and_the_limits_may_be_raised_on_resume(two_ranks: Ranks, saved: Recipe) -> None:
    saved.train.max_steps, saved.resume = 8, "auto"
    saved.train.max_nonfinite_steps, saved.train.stall_seconds = 9, 900.0
    two_ranks.run(runs.run_training, saved)
    assert [row["step"] for row in runs.metrics(saved)] == list(range(1, 9))


def test_another_setting_may_not_change_on_resume(two_ranks: Ranks, saved: Recipe) -> None:
    saved.seed, saved.resume = 4, "auto"
    with pytest.raises(AssertionError, match="seed was 3 and is 4"):
        two_ranks.run(runs.run_training, saved)


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
