"""A run that was killed continues as if it had not been killed; a broken checkpoint is never loaded."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from pathlib import Path
from threading import Event
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from selfgen_ds.checkpoint import export, manifest, resuming, retention, saving
from selfgen_ds.checkpoint.storage import detect_storage
from selfgen_ds.config import (
    CheckpointConfig,
    EvalConfig,
    ModelConfig,
    Recipe,
    Source,
)
from selfgen_ds.files import sync_and_sum
from selfgen_ds.setup.prepare import prepare
from tests.distributed import runs
from tests.ranks import Ranks
from tests.tiers import matrix


def names(settings: Recipe) -> list[str]:
    return [c.path.name for c in manifest.complete_checkpoints(Path(settings.output_dir) / "checkpoints")]


def resume(two_ranks: Ranks, settings: Recipe) -> int:
    """Resume a finished run; return the step that it continues from."""
    shutil.rmtree(Path(settings.output_dir) / "model", ignore_errors=True)
    settings.resume = "auto"
    return two_ranks.run(runs.first_step, settings)[0]


def found_step(folder: Path) -> int | None:
    """Return the step of the checkpoint that a resume would load."""
    checkpoint = resuming.find(folder, detect_storage(folder))
    return None if checkpoint is None else checkpoint.step


@pytest.mark.parametrize("damage", ["missing file", "no marker", "torn marker"])
def test_a_broken_newest_checkpoint_is_passed_over(two_ranks: Ranks, saved: Recipe, damage: str) -> None:
    newest = Path(saved.output_dir) / "checkpoints" / "step-000006"
    if damage == "missing file":
        (newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    elif damage == "no marker":
        (newest / manifest.MARKER).unlink()
    else:
        (newest / manifest.MARKER).write_text((newest / manifest.MARKER).read_text()[:20])
    for _ in range(2):
        assert two_ranks.run(found_step, newest.parent) == [4, 4]
    if damage != "no marker":
        assert (newest / manifest.BROKEN).exists() or damage == "torn marker"


def test_damage_to_any_file_of_the_newest_checkpoint_is_found(two_ranks: Ranks, saved: Recipe, folder: Path) -> None:
    checkpoints = Path(saved.output_dir) / "checkpoints"
    names = sorted(p.relative_to(checkpoints) for p in checkpoints.glob("step-000006/**/*") if p.is_file())
    assert len(names) > 8
    shutil.copytree(checkpoints, folder / "undamaged")
    choice = random.Random(0)
    for number, name in enumerate(names):
        shutil.rmtree(checkpoints)
        shutil.copytree(folder / "undamaged", checkpoints)
        content = bytearray((checkpoints / name).read_bytes())
        place = choice.randrange(len(content))
        if number % 2:
            del content[place:]
        else:
            content[place] ^= 1 << choice.randrange(8)
        (checkpoints / name).write_bytes(content)
        assert two_ranks.run(found_step, checkpoints) == [4, 4], f"{name} at {place}"


def test_a_broken_newest_checkpoint_does_not_crowd_out_good_ones(two_ranks: Ranks, saved: Recipe) -> None:
    folder = Path(saved.output_dir) / "checkpoints"
    (folder / "step-000006" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"")
    saved.checkpoint.keep = 1
    assert resume(two_ranks, saved) == 4
    two_ranks.run(retain, folder, 1)
    assert names(saved) == ["step-000004"]
    assert resume(two_ranks, saved) == 4


def retain(folder: Path, keep: int) -> None:
    retention.retain(folder, keep, "loss", detect_storage(folder))


def saved_to_a_bad_disk(settings: Recipe, bad: list[int]) -> list[str]:
    """Take four steps with a checkpoint after each, and keep one checkpoint.

    Args:
        bad: Steps whose checkpoint rank 1's disk does not give back as it was written.

    Returns:
        Names of the complete checkpoints after each save.
    """
    run = prepare(settings, set())
    folder = Path(settings.output_dir) / "checkpoints"
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for step in range(1, 5):
            runs.steps(run, step, first=step - 1)

            def sync(path: Path, step: int = step) -> list[int]:
                entry = sync_and_sum(path)
                if step in bad and path.name == "generators_rank_1.pt":
                    path.write_bytes(b"?" + path.read_bytes()[1:])
                return entry

            patch.setattr(saving, "sync_and_sum", sync)
            runs.save(run, settings, step)
            retention.retain(folder, 1, "loss", run.folder.storage)
            dist.barrier()
            seen.append(" ".join(c.path.name[-1] for c in manifest.complete_checkpoints(folder)))
            dist.barrier()
    return seen


@matrix(
    ("bad", "complete", "left"),
    [([2], ["1", "1", "3", "4"], "2 4"), ([1, 2, 3, 4], [""] * 4, "1 2 3 4")],
)
def test_older_checkpoints_are_not_removed_for_a_newest_one_that_does_not_come_back_from_the_disk(
    two_ranks: Ranks, folder: Path, bad: list[int], complete: list[str], left: str
) -> None:
    settings = runs.recipe(folder)
    assert two_ranks.run(saved_to_a_bad_disk, settings, bad)[0] == complete
    folder = Path(settings.output_dir) / "checkpoints"
    assert " ".join(sorted(path.name[-1] for path in folder.glob("step-*"))) == left
    if complete[-1]:
        assert two_ranks.run(found_step, folder) == [int(complete[-1])] * 2
    else:
        with pytest.raises(AssertionError, match="every checkpoint is broken"):
            two_ranks.run(found_step, folder)


def test_a_step_that_is_saved_already_is_not_written_again(two_ranks: Ranks, folder: Path) -> None:
    """Otherwise a run with one checkpoint would have none while the second is written."""
    settings = runs.recipe(folder)
    assert two_ranks.run(saved_twice, settings)[0] == [True, True]


def saved_twice(settings: Recipe) -> list[bool]:
    """Save a step twice; return whether its files stay the same, and whether there are any."""
    run = prepare(settings, set())
    runs.steps(run, 1)
    seen = []
    for _ in range(2):
        runs.save(run, settings, 1)
        files = sorted((Path(settings.output_dir) / "checkpoints" / "step-000001").rglob("*"))
        seen.append([(path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in files])
    return [seen[0] == seen[1], len(seen[0]) > 8]


class Killed(BaseException):
    """An exception in the place of a SIGKILL: changes made to files before it stay."""


# File operations left until the kill; None: no kill. An audit hook cannot be removed from a process.
_MOMENTS: dict[str, int | None] = {"left": None}


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
    """Save a second checkpoint and remove the first, and die at the first file operation, then at the second, ...

    Returns:
        The step of the newest intact checkpoint after each death.
    """
    run = prepare(settings, set())
    folder = Path(settings.output_dir) / "checkpoints"
    runs.steps(run, 1)
    runs.save(run, settings, 1)
    shutil.copytree(folder, folder.with_name("first"))
    sys.addaudithook(_count)
    newest_steps: list[int] = []
    write = torch.save
    with pytest.MonkeyPatch.context() as patch:

        def audited(*arguments: Any, **settings: Any) -> None:
            _count("torch.save", ())  # torch.save opens files without an audit event
            write(*arguments, **settings)

        patch.setattr(torch, "save", audited)
        while True:
            shutil.rmtree(folder)
            shutil.copytree(folder.with_name("first"), folder)
            done = False
            _MOMENTS["left"] = len(newest_steps)
            try:
                runs.save(run, settings, 2)
                retention.retain(folder, 1, "loss", run.folder.storage)
                done = True
            except Killed:
                pass
            _MOMENTS["left"] = None
            newest = resuming.find(folder, run.folder.storage)
            assert newest is not None
            newest_steps.append(newest.step)
            left = [path.name for path in folder.glob("step-*")]
            assert len(left) == len(manifest.complete_checkpoints(folder)), "what is half-written is removed"
            if done:
                assert left == ["step-000002"]
                return newest_steps


def test_a_save_that_is_killed_anywhere_leaves_an_intact_checkpoint(one_rank: Ranks, folder: Path) -> None:
    settings = runs.recipe(folder)
    newest_steps = one_rank.run(steps_after_kills, settings)[0]
    assert newest_steps == sorted(newest_steps)
    assert newest_steps.count(1) > 10, "kills before it is complete"
    assert newest_steps.count(2) > 10, "kills while the older one is removed"


def verified_during_steps(settings: Recipe) -> list[tuple[bool, list[int]]]:
    """Take steps while rank 1 has not read its files back, and when it has.

    Returns:
        Before, then after: whether all ranks have read their files, and the steps of the complete checkpoints.
    """
    run, seen, disk = prepare(settings, set()), list[tuple[bool, list[int]]](), Event()
    folder = Path(settings.output_dir) / "checkpoints"

    def slow(path: Path) -> list[int]:
        assert dist.get_rank() == 0 or disk.wait(60)
        return sync_and_sum(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "sync_and_sum", slow)
        runs.steps(run, 1)
        unverified = runs.write(run, settings, 1)
        assert unverified is not None
        for _ in range(2):
            runs.steps(run, 3, first=1)
            seen.append((unverified.is_read(), [c.step for c in manifest.complete_checkpoints(folder)]))
            disk.set()
            while not unverified.is_read():
                pass
        unverified.complete()
    return [*seen, (True, [c.step for c in manifest.complete_checkpoints(folder)])]


def test_steps_are_taken_while_a_checkpoint_is_verified_and_it_counts_when_it_is(
    two_ranks: Ranks, folder: Path
) -> None:
    for seen in two_ranks.run(verified_during_steps, runs.recipe(folder)):
        assert seen == [(False, []), (True, []), (True, [1])]


def test_when_every_checkpoint_is_broken_the_run_stops(two_ranks: Ranks, saved: Recipe) -> None:
    for path in (Path(saved.output_dir) / "checkpoints").glob("step-*/generators_rank_0.pt"):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(AssertionError, match="every checkpoint is broken"):
            resume(two_ranks, saved)
    assert len(runs.metrics(saved)) == 6


def test_half_written_folders_are_removed_and_folders_of_other_names_are_not(two_ranks: Ranks, saved: Recipe) -> None:
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
    (folder / "step-000002" / manifest.MARKER).write_text("{")
    two_ranks.run(retain, folder, 1)
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000002", "step-000006"]


def test_a_newest_checkpoint_with_a_damaged_marker_does_not_count_once_a_run_has_resumed_from_another(
    two_ranks: Ranks, saved: Recipe
) -> None:
    folder = Path(saved.output_dir) / "checkpoints" / "step-000006"
    (folder / manifest.MARKER).write_text("{")
    assert resume(two_ranks, saved) == 4
    assert (folder / manifest.BROKEN).exists()
    assert not (folder / manifest.MARKER).exists()


@pytest.mark.parametrize("change", ["another step", "fewer files", "no checksum", "no object"])
def test_a_marker_that_can_be_read_but_is_not_as_it_was_written_does_not_count(saved: Recipe, change: str) -> None:
    marker = Path(saved.output_dir) / "checkpoints" / "step-000006" / manifest.MARKER
    content = json.loads(marker.read_text())
    if change == "another step":
        content["step"] = 7
    elif change == "fewer files":
        content["files"].pop()
    elif change == "no checksum":
        del content["crc32"]
    marker.write_text("6" if change == "no object" else json.dumps(content))
    assert names(saved) == ["step-000002", "step-000004"]


def test_retention_keeps_the_number_of_checkpoints_that_is_set(two_ranks: Ranks, saved: Recipe) -> None:
    two_ranks.run(retain, Path(saved.output_dir) / "checkpoints", 3)
    assert names(saved) == ["step-000002", "step-000004", "step-000006"]


def test_other_rows_are_refused_on_resume(two_ranks: Ranks, saved: Recipe, folder: Path) -> None:
    runs.write_rows(folder, count=41)
    with pytest.raises(AssertionError, match=r"data\.train: expected the rows that"):
        resume(two_ranks, saved)


def test_max_steps_may_not_be_lowered_on_resume(two_ranks: Ranks, saved: Recipe) -> None:
    saved.train.max_steps = 5
    with pytest.raises(AssertionError, match=r"train\.max_steps: a resumed run may only raise it, was 6 and is 5"):
        resume(two_ranks, saved)


@matrix(("stage", "dtype"), [(3, "bfloat16"), (2, "bfloat16"), (1, "float32"), (0, "float32")])
def test_every_stage_resumes_and_exports(
    two_ranks: Ranks, folder: Path, stage: int, dtype: Literal["float32", "bfloat16"]
) -> None:
    zero = {"stage": stage} | ({"pipeline_loading_checkpoint": True} if stage == 3 else {})  # one rank loads at a time
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    models = []
    for stops in ([6], [3, 6]):
        settings = runs.recipe(folder, deepspeed=str(folder / "ds.json"), resume="auto")
        settings.model.dtype, settings.optim.schedule = dtype, "constant"
        for steps in stops:
            settings.train.max_steps = steps
            two_ranks.run(runs.run_training, settings)
        models.append(runs.weights(settings))
    assert models[0] == models[1]
    last = Path(settings.output_dir) / "checkpoints" / "step-000006"
    export.export_checkpoint(last, folder / "exported")
    loaded = [AutoModelForCausalLM.from_pretrained(p) for p in (folder / "exported", f"{settings.output_dir}/model")]
    assert loaded[0].dtype == getattr(torch, dtype)
    assert [model.config.architectures for model in loaded] == [["LlamaForCausalLM"]] * 2
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in loaded), strict=True):
        assert torch.equal(one, other), name
    assert (folder / "exported" / "generation_config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["packing of weighted sources", "group_by_length"])
def test_packed_grouped_and_weighted_rows_continue_where_they_stopped(
    two_ranks: Ranks, folder: Path, order: str
) -> None:
    (folder / "more.jsonl").write_text(json.dumps({"prompt": "other: ", "completion": "row"}) + "\n")
    sources: list[str | Source] = [
        Source(path=str(folder / name), weight=w) for name, w in (("rows.jsonl", 1.0), ("more.jsonl", 1.0))
    ]
    models = []
    for stops in ([6], [3, 6]):
        settings = runs.recipe(folder, resume="auto")
        settings.data.group_by_length = order == "group_by_length"
        settings.data.packing = order != "group_by_length"
        settings.data.train = sources if settings.data.packing else settings.data.train
        settings.optim.schedule = "constant"
        for steps in stops:
            settings.train.max_steps = steps
            two_ranks.run(runs.run_training, settings)
        models.append(runs.weights(settings))
    assert models[0] == models[1]


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


def without_checkpoints(saved: Recipe, steps: int) -> Path:
    """Leave the run's folder as a kill leaves it that comes during a checkpoint, after some steps."""
    folder = Path(saved.output_dir)
    for path in (folder / "checkpoints").glob("step-*"):
        (path / manifest.MARKER).unlink()
    shutil.rmtree(folder / "model")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:steps]))
    return folder


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_from_the_beginning(
    two_ranks: Ranks, saved: Recipe
) -> None:
    without_checkpoints(saved, saved.checkpoint.every)
    assert resume(two_ranks, saved) == 0


def test_a_run_whose_checkpoints_are_gone_is_not_overwritten(two_ranks: Ranks, saved: Recipe) -> None:
    folder = without_checkpoints(saved, saved.checkpoint.every + 1)
    metrics = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(AssertionError, match=r"holds metrics of 3 steps, but no checkpoint to resume from; put"):
        resume(two_ranks, saved)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    (folder / "metrics.jsonl").unlink()
    (folder / "model").mkdir()
    with pytest.raises(AssertionError, match="holds a trained model, but no checkpoint to resume from"):
        two_ranks.run(runs.first_step, saved)


def test_a_finished_run_exports_again_and_trains_no_further(two_ranks: Ranks, saved: Recipe) -> None:
    before, lines = runs.weights(saved), len(runs.metrics(saved))
    saved.resume = "auto"
    two_ranks.run(runs.run_training, saved)
    assert (runs.weights(saved), len(runs.metrics(saved))) == (before, lines)


def test_max_steps_and_the_limits_may_be_raised_on_resume(two_ranks: Ranks, saved: Recipe) -> None:
    saved.train.max_steps, saved.resume = 8, "auto"
    saved.train.max_nonfinite_steps, saved.train.stall_seconds = 9, 900.0
    two_ranks.run(runs.run_training, saved)
    rows = runs.metrics(saved)
    assert [row["step"] for row in rows] == list(range(1, 9))
    # from the first resumed step on, the learning rate is that of the longer schedule
    assert saved.optim.schedule == "cosine"
    expected = [saved.optim.learning_rate * (1 + math.cos(math.pi * done / 8)) / 2 for done in (6, 7)]
    assert [row["learning_rate"] for row in rows[6:]] == pytest.approx(expected, rel=1e-6)


def test_another_setting_may_not_change_on_resume(two_ranks: Ranks, saved: Recipe) -> None:
    saved.seed, saved.resume = 4, "auto"
    with pytest.raises(AssertionError, match="seed was 3 and is 4"):
        two_ranks.run(runs.run_training, saved)


def test_the_newest_and_the_best_checkpoints_are_kept(two_ranks: Ranks, folder: Path) -> None:
    settings = runs.recipe(folder, checkpoint=CheckpointConfig(every=2, keep=1))
    settings.optim.learning_rate, settings.optim.schedule = 0.3, "constant"  # a rate at which the model unlearns
    settings.data.eval, settings.eval = settings.data.train, EvalConfig(every=1, max_samples=8)
    settings.train.max_steps = 8
    two_ranks.run(runs.run_training, settings)
    losses = {int(row["step"]): row["eval_loss"] for row in runs.metrics(settings)}
    best = min(losses, key=lambda step: losses[step])
    assert names(settings) == sorted({f"step-{best:06d}", "step-000008"})
    assert best not in (7, 8), "the test needs a best step that is not the last"
