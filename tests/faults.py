"""Runs that are broken on purpose: real ranks of `selfgen-ds train`, one of which is killed at a chosen point.

`python -m tests.faults --count 100 --seed 0 --output FILE` (`make soak`) makes many, at random points.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing import set_start_method
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from selfgen_ds.config import CheckpointConfig, EvalConfig, Recipe, SelfgenConfig, TrainConfig, to_yaml
from selfgen_ds.engine import checkpoint
from selfgen_ds.files import lock, write_atomically
from selfgen_ds.scaling.report import commit
from selfgen_ds.versions import versions
from tests.distributed import runs
from tests.ranks import ENVIRONMENT, ROOT, forks, free_port

NOTICED_WITHIN = 60.0  # seconds in which all other ranks have to end
STEPS, EVERY = 12, 3


When = Literal["before", "during", "after"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where something happens to a rank."""

    function: str
    """`module:name` or `module:class.name`, as its caller finds it."""
    call: int = 1
    """The first, second, ... call in a process group. Whoever is lost before is a matter of the launcher's."""
    inside: str | None = None
    """Calls by this function alone count."""
    when: When = "before"
    """`during` is half of the file for `torch.save`, or after `delay` seconds."""
    delay: float = 0.0
    signal: signal.Signals | None = signal.SIGKILL
    """None: the rank hangs."""


def arm(point: Point) -> None:
    """It will happen to this process."""
    original, put = _find(point.function)
    calls, inside = 0, point.inside is None

    @functools.wraps(original)
    def broken(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += inside and dist.is_initialized()
        if calls != point.call or not inside:
            return original(*arguments, **options)
        if point.when == "before":
            _happen(point)
        if point.when == "during" and point.function == "torch:save":
            whole = io.BytesIO()
            original(arguments[0], whole, *arguments[2:], **options)
            with open(arguments[1], "wb") as file:
                file.write(whole.getvalue()[: whole.tell() // 2])
            _happen(point)
        if point.when == "during":
            threading.Timer(point.delay, _happen, (point,)).start()
        result = original(*arguments, **options)
        if point.when == "after":
            _happen(point)
        return result

    put(broken)
    if point.inside is None:
        return
    outer, put_outer = _find(point.inside)

    @functools.wraps(outer)
    def around(*arguments: Any, **options: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            return outer(*arguments, **options)
        finally:
            inside = False

    put_outer(around)


def count(functions: list[str]) -> Callable[[], dict[str, int]]:
    """Count the calls of functions from here on."""
    calls = dict.fromkeys(functions, 0)
    for name in functions:
        original, put = _find(name)

        def counting(*arguments: Any, original: Any = original, name: str = name, **options: Any) -> Any:
            calls[name] += dist.is_initialized()
            return original(*arguments, **options)

        put(functools.wraps(original)(counting))
    return lambda: calls


def _find(function: str) -> tuple[Any, Callable[[Any], None]]:
    module, path = function.split(":")
    *holders, name = path.split(".")
    holder = functools.reduce(getattr, holders, importlib.import_module(module))
    return getattr(holder, name), functools.partial(setattr, holder, name)


def _happen(point: Point) -> None:
    if point.signal is not None:
        os.kill(os.getpid(), point.signal)
    if point.signal in (None, signal.SIGKILL):
        time.sleep(600)  # SIGKILL comes before the next line, if not before this one


class Run:
    """`selfgen-ds ARGUMENTS` on ranks of this machine, each with its output in a file of its own.

    Args:
        folder: Of the logs.
        broken: By rank, where something happens to it.
        counts: Whether the calls of `POINTS` are counted, into the same folder.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        ranks: int = 2,
        broken: dict[int, Point] | None = None,
        counts: bool = False,
    ) -> None:
        self.folder, self.port = folder, free_port()
        context = forks()
        self.processes = []
        for rank in range(ranks):
            point = (broken or {}).get(rank)
            calls = folder / f"calls-{rank}" if counts else None
            process = context.Process(
                target=_rank, args=(arguments, self.log(rank), rank, ranks, self.port, point, calls), daemon=True
            )
            process.start()
            self.processes.append(process)
        self.ended: dict[int, float] = {}
        """By rank: when it ended, in seconds of `time.monotonic`."""

    def log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def output(self, rank: int) -> str:
        return self.log(rank).read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit codes by rank; the ranks are killed if they are not done in time."""
        deadline = time.monotonic() + timeout
        while len(self.ended) < len(self.processes):
            open_ = [p.sentinel for rank, p in enumerate(self.processes) if rank not in self.ended]
            if not wait(open_, max(0.0, deadline - time.monotonic())):
                self.kill()
                logs = "\n".join(self.output(rank)[-2000:] for rank in range(len(self.processes)))
                raise AssertionError(f"not done after {timeout} s:\n{logs}")
            for rank, process in enumerate(self.processes):
                if rank not in self.ended and not process.is_alive():
                    self.ended[rank] = time.monotonic()
        return [process.exitcode or 0 for process in self.processes]

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for process in self.processes:
            process.kill()
            process.join()


def _rank(
    arguments: list[str], log: Path, rank: int, ranks: int, port: int, point: Point | None, calls: Path | None
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    os.environ |= ENVIRONMENT | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # as where a launcher starts them: semaphores then have no names
    from selfgen_ds.cli import main

    counted = None if calls is None else count(list(POINTS))
    if point is not None:
        arm(point)
    if calls is not None and counted is not None:
        atexit.register(lambda: calls.write_text(json.dumps(counted())))
    sys.argv = ["selfgen-ds", *arguments]
    main()


METHODS = {
    "scheduled_sampling": SelfgenConfig(replace_probability=0.5, temperature=2.0),
    "bash": SelfgenConfig(method="bash", replace_probability=0.5, temperature=2.0),
    "rac": SelfgenConfig(method="rac", temperature=2.0, max_new_tokens=12),
}
POINTS = (
    "selfgen_ds.train:train_step",
    "selfgen_ds.engine.policy:EnginePolicy.draw",
    "selfgen_ds.engine.policy:EnginePolicy.complete",
    "selfgen_ds.evaluation.scores:_score",
    "selfgen_ds.journal:Journal.write",
    "selfgen_ds.data.store:Writer.start",
    "selfgen_ds.data.store:Writer.write",
    "selfgen_ds.data.store:Writer.finish",
    "deepspeed:DeepSpeedEngine.save_checkpoint",
    "torch:save",
    "selfgen_ds.engine.checkpoint:sync_and_sum",
    "selfgen_ds.engine.checkpoint:write_marker",
    "selfgen_ds.engine.checkpoint:retain",
    "selfgen_ds.engine.checkpoint:_remove",
    "os:replace",
    "os:fsync",
    "os:unlink",
    "shutil:rmtree",
    "selfgen_ds.train:export_engine",
)
"""What a run does, from its steps to the smallest pieces of a checkpoint."""


def recipe(folder: Path, method: str) -> Recipe:
    """A run of 12 steps that evaluates and saves on the way, of a model with dropout."""
    settings = runs.recipe(
        folder,
        selfgen=METHODS[method],
        train=TrainConfig(max_steps=STEPS, micro_batch_size=2, gradient_accumulation_steps=2),
        checkpoint=CheckpointConfig(every=EVERY, keep=2),
        eval=EvalConfig(every=4, max_samples=4, batch_size=1),
        resume="auto",
    )
    settings.data.eval = settings.data.train
    settings.model.preset = runs.PRESET | {"attention_dropout": 0.1}  # torch's generators matter too
    return settings


def start(settings: Recipe, folder: Path, broken: dict[int, Point] | None = None, counts: bool = False) -> Run:
    """Train a recipe in a folder of logs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(to_yaml(settings), encoding="utf-8")
    return Run(["train", "--config", str(folder / "recipe.yaml")], folder, broken=broken, counts=counts)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A run that nothing happened to."""

    settings: Recipe
    model: bytes
    metrics: list[dict[str, float]]
    calls: list[dict[str, int]]
    """By rank, of `POINTS`."""


def whole(folder: Path, method: str) -> Whole:
    """Run it."""
    settings = recipe(folder, method)
    logs = folder / f"logs-{method}"
    run = start(settings, logs, counts=True)
    assert run.wait() == [0, 0], run.output(0)[-3000:]
    calls = [json.loads((logs / f"calls-{rank}").read_text()) for rank in range(2)]
    return Whole(settings=settings, model=runs.weights(settings), metrics=runs.untimed(settings), calls=calls)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a broken run."""

    reached: bool
    """Whether the rank was killed at all."""
    noticed_s: float
    """From the rank's end to the end of the last other one."""
    line: str
    """That the other rank ended with."""
    steps: int
    """Done by the broken run."""
    resumed_from: int
    """Step that the next start went on from."""


def break_and_resume(against: Whole, folder: Path, rank: int, point: Point) -> Outcome:
    """Break a run like another one, check what is left of it, and let it go on.

    Raises:
        AssertionError: Something that is promised does not hold.
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
        found = re.search(rf"selfgen-ds: error: (rank {rank} on {socket.gethostname()} is gone.*)", run.output(other))
        assert found, run.output(other)[-3000:]
        assert codes[other] == 1
        line = found[1]
    assert noticed < NOTICED_WITHIN
    _check_nothing_left(run, Path(settings.output_dir), before)

    steps = len(runs.metrics(settings)) if (Path(settings.output_dir) / "metrics.jsonl").exists() else 0
    checkpoints = Path(settings.output_dir) / "checkpoints"
    complete = checkpoint.complete_checkpoints(checkpoints)
    newest = complete[-1].step if complete else 0
    assert newest >= (steps - 1) // EVERY * EVERY, "a checkpoint that was complete is lost"
    for found_checkpoint in complete:
        assert not broken_files(found_checkpoint)

    again = start(settings, folder / "resumed")
    assert again.wait() == [0, 0], (again.output(0)[-3000:], again.output(1)[-3000:])
    resumed = re.search(r"resumed from \S+step-(\d+)", again.output(0))
    assert (int(resumed[1]) if resumed else 0) == newest
    check_equal(settings, against)
    _check_nothing_left(again, Path(settings.output_dir), before)
    return Outcome(reached=reached, noticed_s=round(noticed, 2), line=line, steps=steps, resumed_from=newest)


def check_equal(settings: Recipe, against: Whole) -> None:
    """A run has come to the same end, in the same way."""
    assert runs.weights(settings) == against.model, "another model"
    assert runs.untimed(settings) == against.metrics, "other metrics"


def broken_files(complete: checkpoint.Checkpoint) -> list[str]:
    """Of all ranks."""
    return [name for files in complete.files for name in checkpoint.broken_files(complete, files)]


def _shared_memory_left() -> set[str]:
    """Segments that no process has mapped; `_rank` makes no semaphores with names, as other tests' ranks do."""
    segments = {str(path) for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.mp-")}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            segments -= {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return segments


def _check_nothing_left(run: Run, output: Path, shared_memory: set[str]) -> None:
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
    while left := _shared_memory_left() - shared_memory:  # others make theirs before they map them
        assert time.monotonic() < deadline, f"shared memory is left: {left}"
        time.sleep(0.1)
    if output.exists():
        lock(output, "output_dir").close()


def random_point(against: Whole, choice: random.Random) -> tuple[int, Point]:
    """A rank and a point that it comes to."""
    rank = choice.randrange(2)
    function = choice.choice([name for name, calls in against.calls[rank].items() if calls])
    call = choice.randint(1, against.calls[rank][function])
    when: When = choice.choice(("before", "during", "after"))
    return rank, Point(function=function, call=call, when=when, delay=round(choice.uniform(0, 0.1), 4))


def soak(number: int, seed: int, output: Path) -> int:
    """Break runs at random points until `number` have been broken; the number of those that did not hold."""
    failures, found = 0, list[dict[str, Any]]()
    made_with = {"commit": commit(), "cores": os.cpu_count()} | versions()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    runs.write_rows(folder)
    unbroken = {method: whole(folder, method) for method in METHODS}
    for trial in itertools.count():
        if sum(what.get("reached", True) for what in found) == number:
            break
        choice = random.Random(f"{seed}-{trial}")
        method = choice.choice(list(METHODS))
        rank, point = random_point(unbroken[method], choice)
        what: dict[str, Any] = {"trial": trial, "method": method, "rank": rank} | _told(point)
        started, here = time.monotonic(), folder / f"trial-{trial}"
        try:
            what |= {"holds": True} | asdict(break_and_resume(unbroken[method], here, rank, point))
            shutil.rmtree(here)
        except Exception:
            failures += 1
            what |= {"holds": False, "error": traceback.format_exc()}
        what["seconds"] = round(time.monotonic() - started, 1)
        found.append(what)
        print(json.dumps(what), flush=True)
        result = {"made_with": made_with, "seed": seed, "failures": failures, "trials": found}
        write_atomically(output, json.dumps(result, indent=1) + "\n")
    print(f"{number} runs broken, {failures} of them did not hold", flush=True)
    return failures


def _told(point: Point) -> dict[str, Any]:
    return {name: value for name, value in asdict(point).items() if name not in ("signal", "inside")}


def _main() -> None:
    parser = argparse.ArgumentParser(description=soak.__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    sys.exit(soak(options.count, options.seed, options.output) > 0)


if __name__ == "__main__":
    _main()
