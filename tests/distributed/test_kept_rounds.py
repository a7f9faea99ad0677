"""Rounds on the disk: a killed run draws nothing twice, and another run reads them."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import transformers

import selfgen_ds
from selfgen_ds.checkpoint import manifest
from selfgen_ds.config import CheckpointConfig, Recipe, SelfgenConfig
from selfgen_ds.rounds.store import read_audit
from selfgen_ds.setup.prepare import prepare
from tests.distributed import runs
from tests.distributed.round_runs import DROPOUT, METHODS, TIMEOUT, audit, drawn, rounds
from tests.ranks import Ranks
from tests.tiers import matrix

CHUNKS_PER_ROUND = 8

# --- killed ---


def kill(settings: Recipe, moment: Callable[[], bool], delay: float) -> None:
    """Start the run, wait for the moment, and send SIGKILL to all ranks."""
    ranks = Ranks(2)
    deadline = time.monotonic() + TIMEOUT
    try:
        ranks.begin(runs.run_training, settings)
        while not moment():
            assert ranks.busy(), "the run has ended"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        ranks.stop()


def chunks(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of the complete chunks of all rounds."""
    found = {}
    for path in folder.glob("round-*/rows-*.arrow"):
        if path.parent.suffix != ".partial" or path.with_suffix(".json").exists():
            found[f"{path.parent.stem}/{path.name}"] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def counted(partial: Path) -> int:
    """Return the complete chunks of a round that is being drawn, and that may become complete at any moment."""
    try:
        return sum(name.startswith("rows-") and name.endswith(".json") for name in os.listdir(partial))
    except FileNotFoundError:
        return 0


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A run of 12 steps, 5 per round, and what it has left on the disk."""

    settings: Recipe
    rounds: list[str]
    rows: list[list[dict[str, Any]]]
    audits: list[dict[str, Any]]


@pytest.fixture(scope="module")
def kept(two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kept]:
    """Return a function that gives the unbroken run of a method, and trains each once."""

    @functools.cache
    def run(method: str) -> Kept:
        folder = tmp_path_factory.mktemp(method)
        runs.write_rows(folder)
        settings = runs.recipe(folder, selfgen=METHODS[method], checkpoint=CheckpointConfig(every=100, keep=9))
        settings.model.preset = runs.PRESET | DROPOUT
        settings.train.max_steps = 12
        two_ranks.run(runs.run_training, settings, timeout=TIMEOUT)
        names = rounds(settings)
        return Kept(
            settings=settings,
            rounds=names,
            rows=[drawn(settings, name) for name in names],
            audits=[audit(settings, name) for name in names],
        )

    return run


@matrix("method", METHODS)
def test_every_round_is_drawn_with_other_weights_and_its_record_names_them(
    kept: Callable[[str], Kept], method: str
) -> None:
    run = kept(method)
    output = Path(run.settings.output_dir)
    names = [c.path.name for c in manifest.complete_checkpoints(output / "checkpoints")]
    assert names == ["step-000005", "step-000010", "step-000012"]
    assert run.rounds == ["round-01", "round-02", "round-03"]
    assert len({json.dumps(rows) for rows in run.rows}) == 3
    fingerprints = [audit["fingerprint"] for audit in run.audits]
    assert fingerprints[0]["weights"] == fingerprints[0]["model"]
    assert len({fingerprint["weights"] for fingerprint in fingerprints}) == 3
    for name in run.rounds:
        record = read_audit(output / "rollouts" / name)
        assert record["versions"] == {
            m.__name__: str(m.__version__) for m in (selfgen_ds, torch, transformers, deepspeed)
        }
        assert abs(datetime.now(UTC) - datetime.fromisoformat(record["started"])) < timedelta(minutes=10)
        assert record["settings"]["max_length"] == run.settings.data.max_length


@matrix(
    ("method", "changes"),
    # a setting of `rac` that may change without a new draw
    [("bash", {}), ("rac", {"generation_batch_size": 60})],
    ids=METHODS,
)
def test_a_run_killed_in_rounds_ends_with_the_same_model_and_draws_nothing_twice(
    two_ranks: Ranks, kept: Callable[[str], Kept], tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    run = kept(method)
    settings = replace(run.settings, output_dir=str(tmp_path / "killed"), resume="auto")
    out = Path(settings.output_dir)
    rng = random.Random(method)
    known: dict[str, tuple[int, int]] = {}

    def drawing(number: int, more: int) -> bool:
        """Return whether the round has all its chunks, or enough more than at the last kill."""
        complete = out / "rollouts" / f"round-{number:02d}"
        return complete.exists() or counted(complete.with_suffix(".partial")) >= more + len(known) % CHUNKS_PER_ROUND

    def steps_done() -> int:
        return runs.count_lines(out / "metrics.jsonl")

    some = [rng.randrange(1, 4) for _ in range(3)]
    moments: dict[str, Callable[[], bool]] = {
        "drawing round 1": lambda: drawing(1, some[0]),
        "training in round 1": lambda: steps_done() >= some[2],  # the complete round is read again
        "drawing round 2": lambda: drawing(2, some[1]),
    }
    partial: list[Path] = []
    for name, moment in moments.items():
        kill(settings, moment, rng.uniform(0, 0.1))
        print(f"{name}: killed after {steps_done()} steps with {len(chunks(out / 'rollouts'))} chunks")
        now = chunks(out / "rollouts")
        assert {path: now.get(path) for path in known} == known, name
        known = now
        if name.startswith("drawing"):
            partial += (out / "rollouts").glob("*.partial")
        assert not (out / "model").exists()
        settings.selfgen = replace(settings.selfgen, **changes)
    assert partial, "no kill came before a round was complete"
    two_ranks.run(runs.run_training, settings, timeout=TIMEOUT)
    now = chunks(out / "rollouts")
    assert {path: now.get(path) for path in known} == known
    assert rounds(settings) == run.rounds
    assert [drawn(settings, name) for name in run.rounds] == run.rows
    assert [audit(settings, name) for name in run.rounds] == run.audits
    assert runs.untimed(settings) == runs.untimed(run.settings)
    assert runs.weights(settings) == runs.weights(run.settings)


# --- rounds of another run, and more of them ---


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_rounds_beyond_another_runs_are_those_that_its_resume_draws(
    two_ranks: Ranks, folder: Path, method: str
) -> None:
    first = runs.recipe(folder, selfgen=METHODS[method])
    first.optim.schedule, first.train.max_steps = "constant", 7
    two_ranks.run(runs.run_training, first, timeout=TIMEOUT)
    shared = Path(first.output_dir) / "rollouts"
    before = chunks(shared)

    second = runs.recipe(folder, selfgen=replace(METHODS[method], rollouts=str(shared)), optim=first.optim)
    second.train.max_steps = 12
    two_ranks.run(runs.run_training, second, timeout=TIMEOUT)
    assert rounds(second) == ["round-03"]
    assert runs.untimed(second)[:7] == runs.untimed(first)
    assert chunks(shared) == before

    first.train.max_steps, first.resume = 12, "auto"
    two_ranks.run(runs.run_training, first, timeout=TIMEOUT)
    assert rounds(first) == ["round-01", "round-02", "round-03"]
    assert drawn(first, "round-03") == drawn(second, "round-03")
    assert runs.untimed(first) == runs.untimed(second)
    assert runs.weights(first) == runs.weights(second)


def tokens_drawn(settings: Recipe) -> int:
    """Return the number of drawn tokens in the first step's batches of this rank."""
    run = prepare(settings, set())
    assert run.rounds is not None
    return sum(int(batch.replaced_mask.sum()) for batch in run.rounds.step_batches(0).at(0))


def test_a_runs_own_round_goes_before_another_runs(one_rank: Ranks, folder: Path) -> None:
    nothing, much = (
        runs.recipe(folder, selfgen=SelfgenConfig(method="bash", replace_probability=p)) for p in (0.0, 1.0)
    )
    assert one_rank.run(tokens_drawn, nothing) == [0]
    assert one_rank.run(tokens_drawn, much)[0] > 10
    both = runs.recipe(folder, selfgen=replace(nothing.selfgen, rollouts=f"{much.output_dir}/rollouts"))
    shutil.copytree(f"{nothing.output_dir}/rollouts", f"{both.output_dir}/rollouts")
    assert one_rank.run(tokens_drawn, both) == [0]
