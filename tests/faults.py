"""Runs of `selfgen-ds train` that lose a rank at a chosen point, and the checks of what is left of them."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

from selfgen_ds.checkpoint import manifest
from selfgen_ds.config import CheckpointConfig, EvalConfig, Recipe, SelfgenConfig, TrainConfig, to_yaml
from selfgen_ds.files import lock
from tests.distributed import runs
from tests.forked import Run
from tests.points import Point, When

NOTICED_WITHIN = 60.0  # seconds within which all other ranks have to end
STEPS, EVERY = 12, 3

METHODS = {
    "scheduled_sampling": SelfgenConfig(replace_probability=0.5, temperature=2.0),
    "bash": SelfgenConfig(method="bash", replace_probability=0.5, temperature=2.0),
    "rac": SelfgenConfig(method="rac", temperature=2.0, max_new_tokens=12),
}
POINTS = (
    "selfgen_ds.train:train_step",
    "selfgen_ds.model.policy:EnginePolicy.draw",
    "selfgen_ds.model.policy:EnginePolicy.complete",
    "selfgen_ds.evaluation.scores:ask",
    "selfgen_ds.metrics_logger:MetricsLogger.write",
    "selfgen_ds.rounds.store:Writer.start",
    "selfgen_ds.rounds.store:Writer.write",
    "selfgen_ds.rounds.store:Writer.finish",
    "deepspeed:DeepSpeedEngine.save_checkpoint",
    "torch:save",
    "selfgen_ds.checkpoint.saving:sync_and_sum",
    "selfgen_ds.checkpoint.saving:write_marker",
    "selfgen_ds.checkpoint.retention:retain",
    "selfgen_ds.checkpoint.retention:remove",
    "os:replace",
    "os:fsync",
    "os:unlink",
    "shutil:rmtree",
    "selfgen_ds.train:export_engine",
)
"""Functions that a run calls, from its steps to the file operations of a checkpoint."""


def recipe(folder: Path, method: str) -> Recipe:
    """Return the recipe of a run of 12 steps with evaluations and checkpoints, of a model with dropout."""
    settings = runs.recipe(
        folder,
        selfgen=METHODS[method],
        train=TrainConfig(max_steps=STEPS, micro_batch_size=4),
        checkpoint=CheckpointConfig(every=EVERY, keep=2),
        eval=EvalConfig(every=4, max_samples=4, batch_size=1),
        resume="auto",
    )
    settings.data.eval = settings.data.train
    settings.model.preset = runs.PRESET | {"attention_dropout": 0.1}  # a resume has to restore torch's generators too
    return settings


def start(settings: Recipe, folder: Path, broken: dict[int, Point] | None = None, counts: tuple[str, ...] = ()) -> Run:
    """Start the training of a recipe.

    Args:
        folder: Folder of the ranks' logs.
        broken: Points at which something happens to a rank, by rank.
        counts: Functions whose calls are counted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(to_yaml(settings), encoding="utf-8")
    return Run(["train", "--config", str(folder / "recipe.yaml")], folder, broken=broken, counts=counts)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The results of an unbroken run."""

    settings: Recipe
    model: bytes
    metrics: list[dict[str, float]]
    calls: list[dict[str, int]]
    """Calls of each function of `POINTS`, by rank."""


def whole(folder: Path, method: str) -> Whole:
    """Run a method's recipe without breaking it."""
    settings = recipe(folder, method)
    logs = folder / f"logs-{method}"
    run = start(settings, logs, counts=POINTS)
    assert run.wait() == [0, 0], run.output(0)[-3000:]
    calls = [json.loads((logs / f"calls-{rank}").read_text()) for rank in range(2)]
    return Whole(settings=settings, model=runs.weights(settings), metrics=runs.untimed(settings), calls=calls)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a broken run."""

    reached: bool
    """Whether the run came to the point, so that the rank was killed."""
    noticed_s: float
    """Seconds from the end of the killed rank to the end of the other rank."""
    line: str
    """The error line of the other rank, or nothing if it ended normally."""
    steps: int
    """Steps that the broken run logged."""
    resumed_from: int
    """The step from which the next start resumed; 0: from the beginning."""


def break_and_resume(against: Whole, folder: Path, rank: int, point: Point) -> Outcome:
    """Break a run, check its remains, resume it, and compare it with an unbroken run.

    Args:
        against: The unbroken run of the same recipe.
        folder: Folder of the broken run and its logs.
        rank: The rank that is killed.
        point: The point at which the rank is killed.

    Raises:
        AssertionError: A promise is broken.
    """
    settings = replace(against.settings, output_dir=str(folder / "run"))
    before = _shared_memory_left()
    run = start(settings, folder / "broken", {rank: point})
    codes = run.wait()
    other = 1 - rank
    reached = codes[rank] == -signal.SIGKILL
    assert reached or codes == [0, 0], (codes, run.output(0)[-3000:], run.output(1)[-3000:])
    noticed = run.ended[other] - run.ended[rank]
    line = ""
    if reached and codes[other] != 0:
        error = re.search(rf"selfgen-ds: error: (rank {rank} on {socket.gethostname()} is gone.*)", run.output(other))
        assert error, run.output(other)[-3000:]
        assert codes[other] == 1
        line = error[1]
    assert noticed < NOTICED_WITHIN
    _check_nothing_left(run, Path(settings.output_dir), before)

    steps = len(runs.metrics(settings)) if (Path(settings.output_dir) / "metrics.jsonl").exists() else 0
    checkpoints = Path(settings.output_dir) / "checkpoints"
    complete = manifest.complete_checkpoints(checkpoints)
    newest = complete[-1].step if complete else 0
    # The last one may not have been verified yet, but the one before it was, before the last one was written.
    assert newest >= (steps - 1) // EVERY * EVERY - EVERY, "a checkpoint that was complete is lost"
    for each in complete:
        assert not broken_files(each)

    again = start(settings, folder / "resumed")
    assert again.wait() == [0, 0], (again.output(0)[-3000:], again.output(1)[-3000:])
    resumed = re.search(r"resumed from \S+step-(\d+)", again.output(0))
    assert (int(resumed[1]) if resumed else 0) == newest
    check_equal(settings, against)
    _check_nothing_left(again, Path(settings.output_dir), before)
    return Outcome(reached=reached, noticed_s=round(noticed, 2), line=line, steps=steps, resumed_from=newest)


def check_equal(settings: Recipe, against: Whole) -> None:
    """Check that a run has the same metrics and the same exported weights as another one, bit for bit."""
    assert runs.weights(settings) == against.model, "another model"
    assert runs.untimed(settings) == against.metrics, "other metrics"


def broken_files(complete: manifest.Checkpoint) -> list[str]:
    """Return the broken files of a checkpoint, of all ranks."""
    return [name for files in complete.files for name in manifest.broken_files(complete, files)]


def _shared_memory_left() -> set[str]:
    """Return the segments of shared memory that no process has mapped.

    Named semaphores are left out: ranks of other tests make them, those of `tests.forked` do not.
    """
    segments = {str(path) for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.mp-")}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            segments -= {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return segments


def _check_nothing_left(run: Run, output: Path, shared_memory: set[str]) -> None:
    """Check that a run has left no process, no port, no shared memory and no lock."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        assert f"MASTER_PORT={run.port}".encode() not in variables, f"process {entry.name} is left"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", run.port))
    deadline = time.monotonic() + 5.0
    while left := _shared_memory_left() - shared_memory:  # other tests' ranks make segments before they map them
        assert time.monotonic() < deadline, f"shared memory is left: {left}"
        time.sleep(0.1)
    if output.exists():
        lock(output, "output_dir").close()


def random_point(against: Whole, choice: random.Random) -> tuple[int, Point]:
    """Choose a rank and a point to which the rank comes."""
    rank = choice.randrange(2)
    function = choice.choice([name for name, calls in against.calls[rank].items() if calls])
    call = choice.randint(1, against.calls[rank][function])
    when: When = choice.choice(("before", "during", "after"))
    return rank, Point(function=function, call=call, when=when, delay=round(choice.uniform(0, 0.1), 4))
