"""Hosts that do not share the output folder each keep a part of every checkpoint.

A host is a working directory here: ranks on different hosts have the same relative `output_dir`, which is another
folder on each host.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from selfgen_ds.checkpoint import manifest, resuming
from selfgen_ds.checkpoint.storage import detect_storage
from selfgen_ds.config import CheckpointConfig, Recipe, SelfgenConfig
from selfgen_ds.setup.prepare import prepare
from tests.distributed import runs
from tests.distributed.test_lora import with_stage
from tests.ranks import ROOT, Ranks
from tests.tiers import matrix

RUN = "run"


def on_hosts(hosts: Path, ranks_per_host: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on this rank's host."""
    host, local_rank = divmod(dist.get_rank(), ranks_per_host)
    folder, before = hosts / f"host-{host}", os.environ["LOCAL_RANK"]
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        return function(*arguments)
    finally:
        os.chdir(ROOT)
        os.environ["LOCAL_RANK"] = before


def train(settings: Recipe) -> None:
    runs.run_training(settings)


def first_step(settings: Recipe) -> int:
    return prepare(replace(settings, resume="auto"), set()).folder.first_step


def shares_and_writes() -> tuple[bool, bool]:
    storage = detect_storage(Path())
    return storage.shared, storage.writes


def recipe(folder: Path) -> Recipe:
    """Return the recipe of a run of 6 steps at ZeRO stage 2, with checkpoints at 4 and 6."""
    settings = runs.recipe(folder, checkpoint=CheckpointConfig(every=2, keep=2), deepspeed=with_stage(folder, 2))
    settings.optim.schedule, settings.train.max_steps = "constant", 6
    return replace(settings, output_dir=RUN)


@pytest.fixture
def settings(folder: Path) -> Recipe:
    return recipe(folder)


@pytest.fixture(scope="module")
def trained_on_hosts(two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of two hosts with one rank each."""
    folder = tmp_path_factory.mktemp("hosts")
    runs.write_rows(folder)
    two_ranks.run(on_hosts, folder, 1, train, recipe(folder))
    return folder


@pytest.fixture
def saved(trained_on_hosts: Path, folder: Path, settings: Recipe) -> Recipe:
    """Return a copy of the finished run, which the test may change."""
    for host in ("host-0", "host-1"):
        shutil.copytree(trained_on_hosts / host, folder / host)
        config = folder / host / RUN / "config.yaml"
        config.write_text(config.read_text().replace(str(trained_on_hosts), str(folder)))
    return settings


def found_step() -> int | None:
    """Return the step of the checkpoint that a resume would load."""
    checkpoint = resuming.find(Path(RUN) / "checkpoints", detect_storage(Path(RUN)))
    return None if checkpoint is None else checkpoint.step


def steps_on(folder: Path, host: int) -> list[str]:
    checkpoints = folder / f"host-{host}" / RUN / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [
        c.path.name for c in manifest.complete_checkpoints(checkpoints)
    ]
    return sorted(path.name for path in checkpoints.glob("step-*"))


@pytest.mark.parametrize(
    ("ranks_per_host", "expected"),
    [(4, [(True, True)] + [(True, False)] * 3), (2, [(False, True), (False, False)] * 2), (1, [(False, True)] * 4)],
)
def test_ranks_find_out_whether_their_hosts_share_a_folder(
    four_ranks: Ranks, tmp_path: Path, ranks_per_host: int, expected: list[tuple[bool, bool]]
) -> None:
    assert four_ranks.run(on_hosts, tmp_path, ranks_per_host, shares_and_writes) == expected
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_every_host_has_its_ranks_files_and_removes_its_own_folders(
    two_ranks: Ranks, folder: Path, saved: Recipe
) -> None:
    for host in (0, 1):
        assert steps_on(folder, host) == ["step-000004", "step-000006"]
        newest = folder / f"host-{host}" / RUN / "checkpoints" / "step-000006"
        assert {path.name for path in newest.iterdir()} == {
            "complete.json",
            f"generators_rank_{host}.pt",
            "huggingface",
            "mp_rank_00_model_states.pt",
            "source.json",
            "tensors.json",
            f"zero_pp_rank_{host}_mp_rank_00_optim_states.pt",
        }
        files = manifest.complete_checkpoints(newest.parent)[-1].files[host]
        written = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
        assert files.keys() == written - {"complete.json"}
        assert (folder / f"host-{host}" / RUN / "config.yaml").exists()
    assert not (folder / "host-1" / RUN / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, 2])
def test_a_run_resumes_bit_for_bit(two_ranks: Ranks, folder: Path, settings: Recipe, stage: int) -> None:
    settings.deepspeed = with_stage(folder, stage)
    whole = replace(settings, output_dir=str(folder / "whole"))
    two_ranks.run(runs.run_training, whole)
    for steps in (3, 6):
        settings.train.max_steps = steps
        two_ranks.run(on_hosts, folder, 1, train, replace(settings, resume="auto"))
    models = [path / "model" / "model.safetensors" for path in (folder / "whole", folder / "host-0" / RUN)]
    assert models[0].read_bytes() == models[1].read_bytes()


@matrix("damage", ["no marker", "no folder", "a rank's file", "a file of all ranks"])
def test_a_checkpoint_that_is_incomplete_on_one_host_is_passed_over_on_all(
    two_ranks: Ranks, folder: Path, saved: Recipe, damage: str
) -> None:
    newest = folder / "host-1" / RUN / "checkpoints" / "step-000006"
    if damage == "no folder":
        shutil.rmtree(newest)
    else:
        name = {
            "no marker": "complete.json",
            "a rank's file": "generators_rank_1.pt",
            "a file of all ranks": "mp_rank_00_model_states.pt",
        }[damage]
        (newest / name).unlink()
    for _ in range(2):
        assert two_ranks.run(on_hosts, folder, 1, found_step) == [4, 4]
    assert (folder / "host-0" / RUN / "checkpoints" / "step-000006" / manifest.BROKEN).exists()


def resumed(settings: Recipe) -> dict[str, float]:
    found = prepare(replace(settings, resume="auto"), set()).folder.resumed
    assert found is not None
    return found.metrics


def test_if_hosts_recorded_different_evaluations_rank_0s_counts(two_ranks: Ranks, folder: Path, saved: Recipe) -> None:
    for host, loss in ((0, 1.5), (1, float("nan"))):
        path = folder / f"host-{host}" / RUN / "checkpoints" / "step-000006"
        checkpoint = manifest.complete_checkpoints(path.parent)[-1]
        manifest.write_marker(replace(checkpoint, metrics={"loss": loss}))
    assert two_ranks.run(on_hosts, folder, 1, resumed, saved) == [{"loss": 1.5}] * 2


def test_if_no_checkpoint_is_complete_on_all_hosts_the_run_stops_and_loses_none(
    two_ranks: Ranks, folder: Path, saved: Recipe
) -> None:
    """This happens, for example, when the run is started again on other hosts."""
    (folder / "host-1").rename(folder / "elsewhere")
    with pytest.raises(AssertionError) as caught:
        two_ranks.run(on_hosts, folder, 1, first_step, saved)
    line = "is broken or, because the hosts share no folder, incomplete; the newest is run/"
    assert str(caught.value).count(f"InputError: resume: every checkpoint {line}") == 2
    shutil.rmtree(folder / "host-1")
    (folder / "elsewhere").rename(folder / "host-1")
    assert two_ranks.run(on_hosts, folder, 1, first_step, saved) == [6, 6]


def test_another_number_of_ranks_needs_a_shared_folder(four_ranks: Ranks, folder: Path, saved: Recipe) -> None:
    line = "run/checkpoints/step-000006 was written by 2 ranks; converting it for 4 ranks needs a folder that all hosts"
    with pytest.raises(AssertionError, match=line):
        four_ranks.run(on_hosts, folder, 2, first_step, saved)


def test_a_host_without_the_other_hosts_parts_says_so(one_rank: Ranks, folder: Path, saved: Recipe) -> None:
    line = "run/checkpoints/step-000006 was written by 2 ranks, on hosts that share no folder; not all of its parts are"
    with pytest.raises(AssertionError, match=line):
        one_rank.run(on_hosts, folder, 1, first_step, saved)


def test_rounds_need_a_shared_folder(two_ranks: Ranks, folder: Path, settings: Recipe) -> None:
    settings.selfgen = SelfgenConfig(method="bash")
    line = "output_dir: expected a folder that all hosts share, because bash writes rounds there"
    with pytest.raises(AssertionError, match=line) as caught:
        two_ranks.run(on_hosts, folder, 1, train, settings)
    assert all(f"rank {rank}: " in str(caught.value) for rank in (0, 1))
    assert not (folder / "host-0" / RUN / "metrics.jsonl").exists()


def test_a_folder_of_another_run_on_any_host_is_refused(two_ranks: Ranks, folder: Path, settings: Recipe) -> None:
    (folder / "host-1" / RUN / "checkpoints" / "step-000900").mkdir(parents=True)
    with pytest.raises(AssertionError, match=r"output_dir: run holds checkpoints, but no config\.yaml; choose"):
        two_ranks.run(on_hosts, folder, 1, train, settings)
