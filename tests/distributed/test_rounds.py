"""BASH and RAC on real ranks: what does not change their result, kills and resumes, rounds of other runs, refusals."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfgen_ds.config import CheckpointConfig, DataConfig, Recipe, SelfgenConfig, Source, TrainConfig
from selfgen_ds.data.store import load_table, read_audit
from selfgen_ds.engine import checkpoint
from tests.distributed import runs
from tests.ranks import Ranks

TIMEOUT = 90.0
DROPOUT = {"attention_dropout": 0.1}  # torch's generators matter too
TIMED = {"step_time_s", "pass_time_s", "tokens_per_second", "peak_memory_bytes"}
METHODS = {
    "bash": SelfgenConfig(method="bash", replace_probability=0.5, temperature=2.0),
    "rac": SelfgenConfig(method="rac", temperature=2.0, max_new_tokens=12),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs.write_rows(tmp_path)  # 40 rows, 5 steps an epoch
    return tmp_path


def weights(settings: Recipe) -> bytes:
    return (Path(settings.output_dir) / "model" / "model.safetensors").read_bytes()


def untimed(settings: Recipe) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in TIMED} for row in runs.metrics(settings)]


def rounds(settings: Recipe) -> list[str]:
    return sorted(path.name for path in (Path(settings.output_dir) / "rollouts").iterdir())


def drawn(settings: Recipe, name: str) -> list[dict[str, Any]]:
    return list(load_table(Path(settings.output_dir) / "rollouts" / name).with_format(None))


def audit(settings: Recipe, name: str) -> dict[str, Any]:
    """What drew a round, without times."""
    found = read_audit(Path(settings.output_dir) / "rollouts" / name)
    return {key: value for key, value in found.items() if key not in ("started", "seconds_of_last_start")}


# --- nothing drawn is sft ---


@pytest.mark.parametrize("order", ["packing", "group_by_length"])
def test_bash_of_probability_zero_and_rac_without_corrections_are_sft_bit_for_bit(
    two_ranks: Ranks, folder: Path, order: str
) -> None:
    """Two weighted sources, three rounds or more, which end in parts of an epoch do not start with a step's first row."""
    more = [{"prompt": f"other {i}: ", "completion": "row " * (i + 1)} for i in range(7)]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    selfgen = {"sft": runs.SFT, "bash": SelfgenConfig(method="bash", replace_probability=0.0)}
    if order != "packing":
        selfgen["rac"] = SelfgenConfig(method="rac", cue="", sft_share=1.0)
    found = {}
    for name, its in selfgen.items():
        data = DataConfig(
            train=[Source(path=str(folder / f), weight=w) for f, w in (("rows.jsonl", 2.0), ("more.jsonl", 1.0))],
            max_length=128,
            **{order: True},
        )
        train = TrainConfig(epochs=3.3, micro_batch_size=2, gradient_accumulation_steps=2)
        settings = runs.recipe(folder, selfgen=its, data=data, train=train)
        settings.model.preset = runs.PRESET | DROPOUT
        two_ranks.run(runs.run_training, settings, timeout=TIMEOUT)
        rows = [{k: v for k, v in row.items() if k != "replace_probability"} for row in untimed(settings)]
        found[name] = (rows, weights(settings))
        assert name == "sft" or len(rounds(settings)) >= 3
    for name, (rows, its_weights) in found.items():
        assert rows == found["sft"][0], name
        assert its_weights == found["sft"][1], name


# --- killed ---


def kill(settings: Recipe, moment: Callable[[], bool], delay: float) -> None:
    """Start the run, wait for the moment, and SIGKILL all ranks."""
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
    """The chunks that count, of all rounds: inode and time of change."""
    found = {}
    for path in folder.glob("round-*/rows-*.arrow"):
        if path.parent.suffix != ".partial" or path.with_suffix(".json").exists():
            found[f"{path.parent.stem}/{path.name}"] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_in_and_between_rounds_ends_with_the_same_model_and_draws_nothing_twice(
    two_ranks: Ranks, folder: Path, method: str
) -> None:
    settings = runs.recipe(folder, selfgen=METHODS[method], checkpoint=CheckpointConfig(every=100, keep=9))
    settings.model.preset = runs.PRESET | DROPOUT
    settings.train.max_steps = 12
    two_ranks.run(runs.run_training, settings, timeout=TIMEOUT)
    names = [c.path.name for c in checkpoint.complete_checkpoints(Path(settings.output_dir) / "checkpoints")]
    assert names == ["step-000005", "step-000010", "step-000012"]
    whole, whole_metrics, whole_rounds = weights(settings), untimed(settings), rounds(settings)
    whole_audits = [audit(settings, name) for name in whole_rounds]
    whole_rows = [drawn(settings, name) for name in whole_rounds]
    assert whole_rounds == ["round-01", "round-02", "round-03"]
    assert len({json.dumps(rows) for rows in whole_rows}) == 3

    settings.output_dir, settings.resume = str(folder / "killed"), "auto"
    out = Path(settings.output_dir)
    rng = random.Random(method)
    steps_done = lambda: (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0  # noqa: E731

    def drawing(number: int, count: int) -> bool:
        return len(list((out / "rollouts" / f"round-{number:02d}.partial").glob("rows-*.json"))) >= count

    some = [rng.randrange(1, 5) for _ in range(2)]
    moments: dict[str, tuple[Callable[[], bool], float]] = {
        "drawing round 1": (lambda: drawing(1, some[0]), 0.1),
        "training in round 1": (lambda: steps_done() >= rng.randrange(1, 4), 0.1),
        "between rounds": (lambda: (out / "checkpoints" / "step-000005").exists(), 0.5),
        "drawing round 2": (lambda: drawing(2, some[1]), 0.1),
        "training in round 2": (lambda: steps_done() >= 6, 0.1),
    }
    known: dict[str, tuple[int, int]] = {}
    for name, (moment, most) in moments.items():
        kill(settings, moment, rng.uniform(0, most))
        print(f"{name}: killed after {steps_done()} steps with {len(chunks(out / 'rollouts'))} chunks")
        now = chunks(out / "rollouts")
        assert {path: now.get(path) for path in known} == known, name
        known = now
        assert not (out / "model").exists()
    two_ranks.run(runs.run_training, settings, timeout=TIMEOUT)
    now = chunks(out / "rollouts")
    assert {path: now.get(path) for path in known} == known
    assert rounds(settings) == whole_rounds
    assert [drawn(settings, name) for name in whole_rounds] == whole_rows
    assert [audit(settings, name) for name in whole_rounds] == whole_audits
    assert untimed(settings) == whole_metrics
    assert weights(settings) == whole
