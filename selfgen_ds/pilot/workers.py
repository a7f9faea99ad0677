"""Carries out the runs of a study: several at a time, with progress, until all are done or a signal comes.

Several processes, on this host or others, may carry out the same runs in the same folders at the same time: each run
has a lock, which its first process holds.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock

from filelock import FileLock, Timeout

from selfgen_ds.errors import InputError, RunFailed, Stopped
from selfgen_ds.pilot import launching
from selfgen_ds.pilot.launching import Place
from selfgen_ds.pilot.runs import StudyRun
from selfgen_ds.progress import SECONDS, bar
from selfgen_ds.ranks import signals


@contextmanager
def stopping() -> Iterator[Event]:
    """Give an event that a signal sets; a second Ctrl-C ends this process."""
    event, before = Event(), {number: signal.getsignal(number) for number in signals.SIGNALS}

    def stop(number: int, _: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in signals.SIGNALS:
        signal.signal(number, stop)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def carry_out(
    runs: list[StudyRun],
    places: list[Place],
    after: Callable[[StudyRun], None] = StudyRun.remove_models,
    told: str = "runs",
) -> dict[str, Exception]:
    """Train and evaluate the runs that are not done, but for those that another process carries out.

    Args:
        places: Shares of this host: as many runs are carried out at a time.
        after: Called with every run that has been evaluated.
        told: Name of the progress bar.

    Returns:
        Name of an arm -> the `InputError` or `RunFailed` of its run that failed, here or in another process, after
        which no other run of the arm was begun.

    Raises:
        Stopped: A signal came; the runs that were under way are saved.
    """
    left = deque(runs)
    failures: dict[str, Exception] = {}
    lock = Lock()
    before = {run.name: run.failed_at() for run in runs}  # in an earlier call; they are tried again

    def has_failed(run: StudyRun) -> bool:
        if run.failed_at() not in (None, before[run.name]):  # another process has tried it
            failures.setdefault(run.arm.name, RunFailed(run.failure.read_text(encoding="utf-8")))
        return run.arm.name in failures

    def work(place: Place, stop: Event) -> None:
        while not stop.is_set():
            with lock:
                if not left:
                    return
                run = left.popleft()
            try:
                with _claimed(run) as ours:
                    if ours and not run.done and not has_failed(run):
                        _finish(run, place, stop, after)
            except (InputError, RunFailed) as error:
                failures.setdefault(run.arm.name, error)
            except Stopped:  # also if a launcher has sent the signal to the ranks alone
                stop.set()

    with stopping() as stop, ThreadPoolExecutor(len(places)) as pool:
        futures = [pool.submit(work, place, stop) for place in places]
        _show(runs, futures, told)
        for future in futures:
            future.result()
        if stop.is_set():
            raise Stopped
    for run in runs:
        has_failed(run)
    return failures


@contextmanager
def _claimed(run: StudyRun) -> Iterator[bool]:
    """Give whether no other process carries out the run; none does while in the context."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(Path(f"{run.folder}.lock"), blocking=False):
            yield True
    except Timeout:
        yield False


def _finish(run: StudyRun, place: Place, stop: Event, after: Callable[[StudyRun], None]) -> None:
    """Do what is left of a run; if it fails, other processes can read why."""
    run.failure.unlink(missing_ok=True)
    try:
        for command in run.commands:
            launching.run(command, place, run.log, stop)
    except (InputError, RunFailed) as error:
        run.failure.write_text(str(error), encoding="utf-8")
        raise
    run.mark("evaluated")
    after(run)
    run.mark("done")


def _show(runs: list[StudyRun], futures: list[Future[None]], told: str) -> None:
    """Show how many runs are done until the work ends; the time left is that of all runs."""

    def done() -> float:
        return round(sum(run.share_done() for run in runs), 2)

    with bar(told, "run", total=len(runs), initial=done(), smoothing=0) as progress:  # runs take long, and differ
        while wait(futures, timeout=SECONDS).not_done:
            progress.update(done() - progress.n)
        progress.update(done() - progress.n)
