"""Training loops that take turns step by step, each held in a thread of its own, and their peak memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

from deepspeed.accelerator import get_accelerator

from selfgen_ds.ranks import process_group
from selfgen_ds.scaling.memory import LiveTensors

Loop = Callable[[Callable[[], None]], object]
"""A training loop: it builds its model, then calls the given function before every step."""


class Turns:
    """A loop in a thread of its own, which waits before every step until `step` is called.

    Work that the loop does between two steps, such as making the next batch, counts as part of the earlier step.

    Args:
        measured: Whether `peak` will be called.

    Raises:
        BaseException: The loop's own error, in the call during which it happened.
    """

    def __init__(self, loop: Loop, measured: bool) -> None:
        self._go, self._held = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        # a CPU has no allocator to ask for the peak
        self._tensors = LiveTensors() if get_accelerator().device_name() == "cpu" else None
        self._counted = measured
        gc.collect()
        before = self._allocated()
        threading.Thread(target=self._run, args=(loop,), daemon=True).start()
        self._wait()
        self.step(counted=measured)  # creates the optimizer's states
        gc.collect()
        self._states = self._allocated() - before

    def step(self, counted: bool = False) -> None:
        """Let the loop make one step.

        Args:
            counted: On a CPU, count the step's tensors, which takes time.
        """
        self._counted = counted
        self._go.release()
        self._wait()

    def peak(self) -> int:
        """Return the peak memory of a step, in bytes: model, optimizer states, and what the step adds to them."""
        gc.collect()
        before = self._allocated()
        if self._tensors is not None:
            self._tensors.reset()
        else:
            get_accelerator().reset_peak_memory_stats()
        self.step(counted=True)
        most = self._tensors.peak if self._tensors is not None else get_accelerator().max_memory_allocated()
        return self._states + most - before

    def _allocated(self) -> int:
        return self._tensors.live if self._tensors is not None else get_accelerator().memory_allocated()

    def _run(self, loop: Loop) -> None:
        get_accelerator().set_device(process_group.local_rank())  # a new thread starts on device 0
        try:
            self._count(True)
            loop(self._hold)
        except BaseException as error:
            self._error = error
        self._held.release()

    def _hold(self) -> None:
        self._count(False)
        self._held.release()
        self._go.acquire()
        self._count(True)

    def _count(self, enter: bool) -> None:
        if self._counted and self._tensors is not None:
            self._tensors.__enter__() if enter else self._tensors.__exit__(None, None, None)

    def _wait(self) -> None:
        self._held.acquire()
        if self._error is not None:
            raise self._error
