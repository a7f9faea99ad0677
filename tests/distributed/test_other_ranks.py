"""A run that is resumed with another number of ranks computes what it would have computed with the first number."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal

from selfgen_ds.checkpoint import manifest, universal
from selfgen_ds.config import CheckpointConfig, LoraConfig, ModelConfig, Recipe, SelfgenConfig, TrainConfig
from selfgen_ds.model.checksum import weights_checksum
from selfgen_ds.rounds.store import Writer, load_table
from selfgen_ds.setup.prepare import prepare
from tests.architectures import ARCHITECTURES
from tests.distributed import runs
from tests.distributed.test_ds_configs import write_json
from tests.ranks import ROOT, Ranks
from tests.tiers import matrix

TIMEOUT = 120.0
SAVED, STEPS = 3, 6
CPU = str(ROOT / "ds_configs" / "zero3_cpu.json")


@pytest.fixture(scope="module")
def ranks(one_rank: Ranks, two_ranks: Ranks, four_ranks: Ranks) -> Iterator[dict[int, Ranks]]:
    three_ranks = Ranks(3)
    yield {1: one_rank, 2: two_ranks, 3: three_ranks, 4: four_ranks}
    three_ranks.stop()


class Steps(NamedTuple):
    """The results of one rank's steps."""

    losses: list[float]
    contexts: dict[tuple[int, int], list[int]]
    accumulation: int
    checksum: str
    """Checksum of the weights before the first step."""
    saved_checksum: str
    """Checksum of the weights that were saved; before the first step if none were."""
    logged: list[str]


def steps(settings: Recipe, save_at: int = 0, until: int = STEPS) -> Steps:
    """Start or resume a run, and take its steps up to `until`; save a checkpoint after step `save_at`."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("selfgen_ds")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        run = prepare(settings, set())
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    checksum = weights_checksum(run.engine)
    results, contexts = runs.steps(run, save_at or until, first=run.folder.first_step)
    saved_checksum = checksum
    if save_at:
        saved_checksum = weights_checksum(run.engine)
        runs.save(run, settings, save_at)
        more, others = runs.steps(run, until, first=save_at)
        results, contexts = results + more, contexts | others
    losses = [result.loss for result in results]
    return Steps(losses, contexts, run.step_batches.accumulation, checksum, saved_checksum, records)


def joined(by_rank: list[Steps]) -> tuple[list[float], dict[tuple[int, int], list[int]]]:
    """Return the losses, which all ranks agree on, and the contexts of all ranks."""
    assert all(steps.losses == by_rank[0].losses for steps in by_rank)
    return by_rank[0].losses, {key: row for steps in by_rank for key, row in steps.contexts.items()}


def check_continues(before: list[Steps], after: list[Steps]) -> None:
    """Check that a resumed run has the losses and contexts that the first one had after step `SAVED`."""
    losses, contexts = joined(before)
    resumed_losses, resumed_contexts = joined(after)
    assert resumed_losses == pytest.approx(losses[SAVED:], rel=1e-6)
    assert resumed_contexts == {key: row for key, row in contexts.items() if key[0] >= SAVED}


def resumed(settings: Recipe, name: str) -> Recipe:
    """Return a recipe that resumes a copy of the run's output folder."""
    copy = replace(settings, output_dir=f"{settings.output_dir}-{name}", resume="auto")
    shutil.copytree(settings.output_dir, copy.output_dir)
    return copy


def small(folder: Path, **changes: Any) -> Recipe:
    runs.write_rows(folder)
    settings = runs.recipe(folder, **changes)
    settings.train.max_steps = STEPS
    return settings


@pytest.fixture(scope="module")
def two(ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[Steps]]:
    """Return a run of 2 ranks with a checkpoint in the middle. Its JSON has the batch sizes of 2 ranks as numbers."""
    folder = tmp_path_factory.mktemp("two")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    sizes = {"train_batch_size": 8, "gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 2}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero} | sizes))
    settings = small(folder, deepspeed=str(folder / "ds.json"))
    return settings, ranks[2].run(steps, settings, SAVED)


# --- the same curve ---


@matrix(("number", "accumulation"), [(1, 4), (3, 2), (4, 1)])
def test_a_run_of_two_ranks_continues_with_another_number(
    ranks: dict[int, Ranks], two: tuple[Recipe, list[Steps]], number: int, accumulation: int
) -> None:
    settings, before = two
    after = ranks[number].run(steps, resumed(settings, f"a+b ({number})"))  # a folder may have any name
    check_continues(before, after)
    assert sum(len(steps.contexts) for steps in after) == 8 * (STEPS - SAVED)
    assert {steps.accumulation for steps in after} == {accumulation}
    line = f"a step keeps its 8 rows, now as {accumulation} micro-batches of 2 rows per rank"
    assert f"resuming a run of 2 ranks on {number} ranks: {line}" in after[0].logged
    assert not any("nothing to do" in line for line in after[0].logged)


@pytest.mark.slow
def test_a_run_goes_to_more_ranks_and_back(ranks: dict[int, Ranks], two: tuple[Recipe, list[Steps]]) -> None:
    settings, before = two
    there = resumed(settings, "there")
    losses = joined(ranks[3].run(steps, there, SAVED + 1, SAVED + 1))[0]
    losses += joined(ranks[2].run(steps, there))[0]
    assert losses == pytest.approx(joined(before)[0][SAVED:], rel=1e-6)
    assert [c.world_size for c in manifest.complete_checkpoints(Path(there.output_dir) / "checkpoints")] == [2, 3]


@pytest.mark.slow
def test_a_step_of_three_ranks_does_not_divide_by_two(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    settings = small(tmp_path, train=TrainConfig(micro_batch_size=2, gradient_accumulation_steps=1))
    settings.train.max_steps = STEPS
    before = ranks[3].run(steps, settings, SAVED)
    after = ranks[2].run(steps, replace(settings, resume="auto"))
    check_continues(before, after)
    assert after[0].accumulation == 2
    assert len(after[0].contexts) == 2 * len(after[1].contexts) == 4 * (STEPS - SAVED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("stage 0", 3),
        ("stage 1", 3),
        ("stage 2", 1),
        ("stage 3 bf16", 1),
        ("offload", 1),
        ("lora", 3),
        ("tied", 1),
        ("experts", 3),
        ("packing", 3),
    ],
)
@pytest.mark.timeout(600)
def test_every_kind_of_run_continues_with_another_number_of_ranks(
    ranks: dict[int, Ranks], tmp_path: Path, kind: str, number: int
) -> None:
    """Every path of the code that saves and loads runs once, alternately with fewer and with more ranks."""
    settings = small(tmp_path)
    if kind.startswith("stage"):
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": int(kind.split()[1])}}))
        settings.deepspeed = str(tmp_path / "ds.json")
    if kind.endswith("bf16"):
        settings.model.dtype = "bfloat16"
    if kind == "offload":
        settings.deepspeed = write_json(tmp_path, "zero3_offload.json")
    if kind == "lora":
        base = runs.write_model(tmp_path)
        settings.model = ModelConfig(name_or_path=base, dtype="float32", lora=LoraConfig(r=4))
    if kind == "tied":
        settings.model.preset = runs.PRESET | {"tie_word_embeddings": True}
    if kind == "experts":
        settings.model.preset = ARCHITECTURES["mixtral"]
    settings.data.packing = kind == "packing"
    before = ranks[2].run(steps, settings, SAVED, timeout=400.0)  # an op may be compiled
    assert before[0].saved_checksum != before[0].checksum
    after = ranks[number].run(steps, resumed(settings, str(number)), timeout=TIMEOUT)
    assert {steps.checksum for steps in after} == {steps.saved_checksum for steps in before}
    if kind.endswith("bf16"):  # gradients are summed in bfloat16, in another order
        assert joined(after)[0] == pytest.approx(joined(before)[0][SAVED:], rel=1e-3)
    else:
        check_continues(before, after)


@pytest.mark.slow
def test_ranks_beyond_the_rows_of_a_step_have_nothing_to_do(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    settings = small(tmp_path, train=TrainConfig(micro_batch_size=1, gradient_accumulation_steps=1))
    settings.train.max_steps = STEPS
    before = ranks[2].run(steps, settings, SAVED)
    after = ranks[4].run(steps, replace(settings, resume="auto"))
    check_continues(before, after)
    assert [len(steps.contexts) for steps in after] == [3, 3, 0, 0]
    assert "a step has fewer micro-batches than there are ranks: 2 ranks have nothing to do" in after[0].logged


def random_number(settings: Recipe) -> float:
    """Return the first random number after a resume, which dropout would use."""
    prepare(settings, set())
    return float(torch.rand(1))


@pytest.mark.slow
def test_another_number_of_ranks_has_new_random_numbers_which_every_attempt_repeats(
    ranks: dict[int, Ranks], two: tuple[Recipe, list[Steps]]
) -> None:
    settings = two[0]
    attempts = [ranks[3].run(random_number, resumed(settings, f"attempt-{number}")) for number in range(2)]
    assert attempts[0] == attempts[1]
    beginning = ranks[3].run(random_number, replace(settings, output_dir=settings.output_dir + "-new", deepspeed=CPU))
    assert len({*attempts[0], *beginning}) == 6


# --- rounds ---


def rounds(settings: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every round, by the name of its folder."""
    folders = sorted((Path(settings.output_dir) / "rollouts").glob("round-*"))
    return {folder.name: list(load_table(folder).with_format(None)) for folder in folders}


def curve(settings: Recipe) -> dict[str, list[float]]:
    keys = ("loss", "learning_rate", "epoch", "round", "replace_probability", "differing_share", "drawn_tokens")
    return {key: [row[key] for row in runs.metrics(settings)] for key in keys}


@pytest.fixture(scope="module")
def bash(ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Return a run of 12 steps, 5 per round, with checkpoints at 5, 7, 10, and 12."""
    selfgen = SelfgenConfig(method="bash", replace_probability=0.5, temperature=2.0, schedule="linear")
    checkpoints = CheckpointConfig(every=7, keep=9)
    settings = small(tmp_path_factory.mktemp("bash"), selfgen=selfgen, checkpoint=checkpoints)
    settings.train.max_steps = 12
    ranks[2].run(runs.run_training, settings, timeout=TIMEOUT)
    assert len(rounds(settings)) == 3
    return settings


def check_same_rounds(ranks: Ranks, settings: Recipe, whole: Recipe) -> None:
    ranks.run(runs.run_training, settings, timeout=TIMEOUT)
    metrics, expected = curve(settings), curve(whole)
    assert metrics.keys() == expected.keys()
    for key, values in metrics.items():
        assert values == pytest.approx(expected[key], rel=1e-6), key
    assert rounds(settings) == rounds(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
def test_a_round_continues_in_its_middle_and_the_next_round_draws_the_same(
    ranks: dict[int, Ranks], bash: Recipe, number: int
) -> None:
    part = resumed(bash, f"middle-{number}")
    for path in ("checkpoints/step-000010", "checkpoints/step-000012", "rollouts/round-03", "model"):
        shutil.rmtree(Path(part.output_dir) / path)
    check_same_rounds(ranks[number], part, bash)


def die_in_the_second_round(settings: Recipe) -> None:
    """Send SIGKILL to each rank when it has written two chunks of the second round."""
    write, seen = Writer.write, []

    def counted(self: Writer, *arguments: Any) -> None:
        write(self, *arguments)
        seen.append(self.folder.name)
        if seen.count("round-02") == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Writer.write = counted  # type: ignore[assignment, method-assign]
    runs.run_training(settings)


def killed(function: Any, *arguments: Any, number: int = 2) -> None:
    """Run a function, which kills its ranks, on new ranks."""
    group, deadline = Ranks(number), time.monotonic() + TIMEOUT
    try:
        group.begin(function, *arguments)
        while group.busy():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        group.stop()


@pytest.mark.slow
def test_drawing_a_round_continues_with_another_number_of_ranks(ranks: dict[int, Ranks], bash: Recipe) -> None:
    part = replace(bash, output_dir=bash.output_dir + "-killed", resume="auto")
    killed(die_in_the_second_round, part)
    partial = Path(part.output_dir) / "rollouts" / "round-02.partial"
    before = {path.name: path.stat().st_ino for path in partial.glob("*.arrow") if path.with_suffix(".json").exists()}
    assert 2 <= len(before) < 8
    check_same_rounds(ranks[3], part, bash)
    after = {path.name: path.stat().st_ino for path in partial.with_suffix("").glob("*.arrow")}
    assert {name: after[name] for name in before} == before
    assert len(after) == 8


# --- the conversion ---


def die_converting(settings: Recipe) -> None:
    """Send SIGKILL to rank 0 between the two halves of a conversion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ds_to_universal, "_merge_zero3_slice_files", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        prepare(settings, set())


def test_a_killed_conversion_is_never_taken_for_a_checkpoint_and_is_removed(
    ranks: dict[int, Ranks], two: tuple[Recipe, list[Steps]]
) -> None:
    settings, before = two
    part = resumed(settings, "killed")
    left = Path(part.output_dir) / "checkpoints" / universal.FOLDER
    killed(die_converting, part, number=1)
    assert any(path.is_file() for path in left.rglob("*"))
    assert [c.step for c in manifest.complete_checkpoints(left.parent)] == [SAVED]
    again = resumed(part, "as-it-was")
    losses = joined(ranks[2].run(steps, again))[0]
    assert losses == joined(before)[0][SAVED:]  # with as many ranks nothing has to be converted
    ranks[1].run(steps, part)
    for run in (part, again):
        names = {path.name for path in (Path(run.output_dir) / "checkpoints").iterdir() if path.is_dir()}
        assert names == {f"step-{SAVED:06d}"}


def bytes_of_common_state(settings: Recipe) -> int:
    """Return the size of the one converted file that every rank loads."""
    engine = prepare(replace(settings, resume=None, output_dir=settings.output_dir + "-new"), set()).engine
    with universal.converted(engine, Path(settings.output_dir) / "checkpoints" / f"step-{SAVED:06d}") as folder:
        return (folder / f"step-{SAVED:06d}" / "zero" / "optimizer_state.pt").stat().st_size


@pytest.mark.slow
def test_the_file_that_every_rank_loads_has_no_tensors(
    ranks: dict[int, Ranks], two: tuple[Recipe, list[Steps]]
) -> None:
    part = replace(resumed(two[0], "sizes"), deepspeed=CPU)
    assert ranks[3].run(bytes_of_common_state, part)[0] < 20_000
    shard = Path(part.output_dir) / "checkpoints" / "step-000003" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    assert shard.stat().st_size > 200_000


def with_free(settings: Recipe, free: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        usage = shutil.disk_usage(settings.output_dir)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        prepare(settings, set())


@pytest.mark.slow
def test_a_conversion_that_the_disk_has_no_room_for_is_one_clear_line(
    ranks: dict[int, Ranks], two: tuple[Recipe, list[Steps]]
) -> None:
    part = resumed(two[0], "full")
    files = manifest.complete_checkpoints(Path(part.output_dir) / "checkpoints")[0].files
    optimizer = sum(size for of_rank in files for name, (size, _) in of_rank.items() if "optim" in name)
    line = (
        r"InputError: resume: .*step-000003 was written by another number of ranks; converting it takes \d\.\d MB, and "
        r"\d\.\d MB are free there\n"
    )
    with pytest.raises(AssertionError, match=line) as caught:
        ranks[3].run(with_free, part, 2 * optimizer)
    assert str(caught.value).count("InputError: resume") == 3  # one line of every rank
    ranks[3].run(with_free, part, 3 * optimizer)


@pytest.mark.slow
def test_ranks_that_would_have_none_of_the_norms_are_refused_before_stage_3(
    ranks: dict[int, Ranks], tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    settings = small(tmp_path, deepspeed=str(tmp_path / "ds.json"))
    tiny = {"hidden_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    settings.model.preset = runs.PRESET | tiny  # the norms have 12 numbers in all
    losses = joined(ranks[2].run(steps, settings, SAVED))[0]
    part = replace(settings, resume="auto")
    with pytest.raises(
        AssertionError, match=r"InputError: resume: .* cannot be loaded by 4 ranks: .*; start fewer ranks"
    ):
        ranks[4].run(steps, part)
    assert joined(ranks[3].run(steps, part))[0] == pytest.approx(losses[SAVED:], rel=1e-6)
