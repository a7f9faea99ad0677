"""What can interrupt training: a signal that asks for an end, and a step that never ends.

A scheduler sends SIGTERM or SIGUSR1 before it takes a machine away. One rank that got it is enough: wherever time is
spent (steps, chunks of a round, batches of an evaluation), all ranks ask together whether any did.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

import deepspeed
import torch
import torch.distributed as dist

import selfgen_ds
from selfgen_ds.errors import Stopped
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.signals import BEFORE, SIGNALS, STOPPED

log = logging.getLogger("selfgen_ds")

HELPERS = ("watch", "heartbeat", "heartbeat guard")
"""Threads that only watch."""
_OUTSIDE = "is not in a collective"
_OURS = str(Path(selfgen_ds.__file__).parent)
_LIBRARIES = tuple(str(Path(str(library.__file__)).parent) for library in (dist, deepspeed))


class Watch:
    """Signals are noticed from entering it to leaving it; what stalls, from `begin` to `pause`, and on when asked.

    A signal before `begin` ends all ranks at once: there is nothing to save.

    Args:
        stall_seconds: Every rank tells where it is when none has made a forward for so long, and the run ends after
            twice as long.
    """

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._signal: int | None = None
        self._agreed = False
        self._paused = True
        self._progress = 0.0
        """When a rank last made a forward, or all asked whether to go on."""
        self._of_all = 0
        self._told = False
        self._starting = True
        self.forwards = 0
        """That the model has made since `begin`."""

    def __enter__(self) -> Watch:
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        # Python's handlers wait for the main thread, which may wait in a collective; this wakes the thread at once
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._over = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for end in self._pipe:
            os.close(end)

    def begin(self, module: torch.nn.Module) -> None:
        """Steps begin: from here on signals wait to be asked for, stalls are noticed, the model's forwards counted."""
        self._starting = False
        self._resume()
        module.register_forward_pre_hook(self._count)
        if self._signal is not None:  # it came at the last moment
            self._end_all()

    def pause(self) -> None:
        """What comes now may take long: nothing is a stall until the ranks ask again."""
        self._paused = True

    def _resume(self) -> None:
        self._progress, self._told, self._paused = time.monotonic(), False, False

    def requested(self, forwards: int = 0) -> bool:
        """Whether a signal has come to any rank. Collective; something has ended.

        Args:
            forwards: Made since the last time, where all ranks have to make as many.

        Raises:
            RuntimeError: They did not: sooner or later they would wait for each other in vain.
        """
        self._resume()
        asked = int(self._signal is not None)
        found = torch.tensor([asked, forwards, -forwards], device=process_group.device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        stop, most, least = found.tolist()
        if most != -least:
            everyone = process_group.all_gather_object(forwards)
            other = next(rank for rank, made in enumerate(everyone) if made != everyone[0])
            raise RuntimeError(f"rank {other} made {everyone[other]} forwards in a step, rank 0 made {everyone[0]}")
        if stop and not self._agreed:
            self._agreed = True
            log.warning("a signal asks for the end: this is where the run is saved")
        return bool(stop)

    def poll(self) -> None:
        """As `requested`.

        Raises:
            Stopped: If so.
        """
        if self.requested():
            raise Stopped

    def _run(self) -> None:
        while not self._over:
            if select.select([self._pipe[0]], [], [], 1.0)[0]:
                for number in os.read(self._pipe[0], 64):
                    if number in SIGNALS:
                        self._notice(number)
            of_all = (
                self.forwards
                if process_group.heartbeat is None
                else process_group.heartbeat.forwards_of_all(self.forwards)
            )
            if of_all != self._of_all:
                self._of_all, self._progress, self._told = of_all, time.monotonic(), False
            if not self._paused:
                self._look(time.monotonic() - self._progress)

    def _notice(self, number: int) -> None:
        self._signal = number
        if self._starting:
            self._end_all()

    def _count(self, *_: object) -> None:
        self.forwards += 1

    def _end_all(self) -> None:
        if process_group.heartbeat is not None:
            process_group.heartbeat.end_all(BEFORE, STOPPED)
        print(f"selfgen-ds: {BEFORE}", file=sys.stderr, flush=True)
        os._exit(STOPPED)

    def _look(self, waited: float) -> None:
        if waited > 2 * self._stall_seconds:
            line = f"no rank has made a forward for {waited:.0f} s (train.stall_seconds)"
            sys.stderr.write(f"selfgen-ds: error: {line}; the run ends\n")
            sys.stderr.flush()
            if process_group.heartbeat is not None:
                process_group.heartbeat.end_all(line)
            os._exit(1)
        if waited > self._stall_seconds and not self._told:
            self._told = True
            where, stacks = _stacks()
            self._say(f"no rank has made a forward for {waited:.0f} s (train.stall_seconds); {where}\n{stacks}")
            if process_group.heartbeat is not None:
                process_group.heartbeat.stalled(where)

    def _say(self, text: str) -> None:
        place = "this process" if process_group.heartbeat is None else process_group.heartbeat.place
        sys.stderr.write(f"selfgen-ds: {place}: {text}\n")
        sys.stderr.flush()


def _stacks() -> tuple[str, str]:
    """Where this process is, in a line, and the stacks of its threads that are not ours."""
    frames = sys._current_frames()
    threads = [thread for thread in threading.enumerate() if thread.name not in HELPERS and thread.ident in frames]
    stacks = {t.name: frames[t.ident] for t in threads if t.ident is not None}
    text = "".join(f"thread {name}:\n{''.join(traceback.format_stack(frame))}" for name, frame in stacks.items())
    places = [_where(frame) for frame in stacks.values()]
    return next((place for place in places if not place.startswith(_OUTSIDE)), places[0]), text


def _where(frame: FrameType) -> str:
    """The collective or DeepSpeed function that a thread is in, and our line that called it."""
    inside, ours = _OUTSIDE, ""
    at: FrameType | None = frame
    while at is not None and not ours:
        file, name = at.f_code.co_filename, at.f_code.co_name
        collective = file.startswith(_LIBRARIES) and name != "wrapper"
        if collective and (inside == _OUTSIDE or file.startswith(_LIBRARIES[0])):
            inside = f"waits in {name}"
        if file.startswith(_OURS):
            ours = f", from {Path(file).relative_to(Path(_OURS).parent)}:{at.f_lineno} ({at.f_code.co_name})"
        at = at.f_back
    return inside + ours
