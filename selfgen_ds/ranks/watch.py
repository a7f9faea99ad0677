"""Notice the two interruptions of training: a signal that asks the run to stop, and a step that never ends.

A scheduler sends SIGTERM or SIGUSR1 before it takes a machine away, and a terminal sends SIGINT on Ctrl-C. Wherever a
run spends time (steps, chunks of a round, evaluation batches), all ranks ask together whether any of them received one.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path

import torch

from selfgen_ds.errors import Stopped
from selfgen_ds.ranks import process_group, signals
from selfgen_ds.ranks.heartbeat import StallLimit

log = logging.getLogger("selfgen_ds")


class Watch:
    """A context in which signals and stalls are noticed, each phase of a run with a limit of its own.

    A signal before `begin` ends all ranks at once, because there is nothing to save. A second SIGINT ends this rank at
    once, whatever would be lost.

    Args:
        steps, saving: Seconds without a forward or collective on any rank after which every rank prints its stacks: in
            the steps, and while a checkpoint or the model is written. After twice as many seconds the run ends.
    """

    def __init__(self, steps: float, saving: float) -> None:
        self._steps = StallLimit(seconds=steps, setting="train.stall_seconds")
        self._saving = StallLimit(seconds=saving, setting="checkpoint.stall_seconds")
        self._signal = 0  # the number of the last signal that this rank received
        self._interrupted = False
        self._announced = False
        self._starting = True
        self._lock = threading.Lock()  # of the last signal and of the end of the start: which of them was first
        self.forwards = 0
        """Forwards that this rank's model has made since `begin`."""

    def __enter__(self) -> Watch:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        # Python runs signal handlers in the main thread, which may wait in a collective; the pipe wakes `_run` at once.
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in signals.SIGNALS}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for end in self._pipe:
            os.close(end)

    def begin(self, module: torch.nn.Module, folder: Path | None = None) -> None:
        """Begin the steps: from now on signals wait for `requested`, and stalls are noticed.

        Args:
            module: The model whose forwards are counted.
            folder: Folder of the run, into which a stalled rank writes its last collectives.
        """
        assert process_group.heartbeat is not None
        with self._lock:
            self._starting, received = False, bool(self._signal)
        if received:
            self._thread.join()  # it ends all ranks, at their next heartbeat; a step until then would be lost
        self._heartbeat = process_group.heartbeat
        self._heartbeat.stall_limit = self._steps
        self._heartbeat.flight_record = None if folder is None else folder / "flight-record"
        process_group.shorten_timeout()
        module.register_forward_pre_hook(self._count)

    def saving(self) -> None:
        """Let the limit of saving hold until the next call of `requested`: it may take longer than a step."""
        self._heartbeat.stall_limit = self._saving

    def requested(self, forwards: int = 0) -> bool:
        """Return whether any rank has received a signal.

        Collective: every rank must call this, so that all ranks stop at the same point.

        Args:
            forwards: Forwards since the last call, if all ranks have to make the same number.

        Raises:
            RuntimeError: The ranks made different numbers of forwards. Sooner or later they would wait for each other
                in vain.
        """
        self._heartbeat.stall_limit = self._steps
        number, most, least = process_group.max_over_ranks([self._signal, forwards, -forwards])
        if most != -least:
            made = process_group.all_gather_object(forwards)
            other = next(rank for rank, count in enumerate(made) if count != made[0])
            raise RuntimeError(f"rank {other} made {made[other]} forwards in a step, rank 0 made {made[0]}")
        if number and not self._announced:
            self._announced = True
            log.warning("received %s: saving, then stopping", signal.Signals(number).name)
        return bool(number)

    def poll(self) -> None:
        """Raise an exception if any rank has received a signal.

        Collective: every rank must call this, so that all ranks stop at the same point.

        Raises:
            Stopped: A rank has received a signal.
        """
        if self.requested():
            raise Stopped

    def _run(self) -> None:
        while number := os.read(self._pipe[0], 1)[0]:  # zero is from __exit__
            if number in signals.SIGNALS:
                if number == signal.SIGINT and self._interrupted:
                    os.write(2, b"selfgen-ds: interrupted twice; the last steps are not saved\n")
                    os._exit(signals.INTERRUPTED)
                self._interrupted |= number == signal.SIGINT
                with self._lock:
                    self._signal, starting = number, self._starting
                if starting and process_group.heartbeat is not None:
                    process_group.heartbeat.end_all(signals.BEFORE, signals.STOPPED)
                elif starting:
                    signals.exit_stopped()

    def _count(self, *_: object) -> None:
        self.forwards += 1
        self._heartbeat.forwards = self.forwards
