"""The time of an optimizer step, phase by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator

from selfgen_ds.ranks import process_group

PHASES = ("pass", "forward", "backward", "optimizer", "other")
"""Phases of a step; `other` is the rest of the step's time, such as sums over ranks."""


class StepClock:
    """Measures the seconds of each phase of a step.

    The engine's `forward`, `backward`, and `step` are wrapped, so that the step can be the trainer's own code.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._in_phase = False
        for name, phase in {"forward": "forward", "backward": "backward", "step": "optimizer"}.items():
            setattr(engine, name, self._timed(getattr(engine, name), phase))

    def _timed(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return call(*args, **kwargs)

        return timed

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the context for a phase; inside another phase, for the outer phase."""
        if self._in_phase:
            yield
            return
        self._in_phase = True
        started = time.perf_counter()
        yield
        get_accelerator().synchronize()
        self._seconds[name] += time.perf_counter() - started
        self._in_phase = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time a step from its start to its end on this rank, and start the phases anew."""
        self._seconds.clear()
        started = time.perf_counter()
        yield
        get_accelerator().synchronize()
        self._total = time.perf_counter() - started

    def seconds(self) -> list[float]:
        """Return the seconds of each of `PHASES` and of the whole last step, each from the rank that took longest.

        Collective: every rank must call this, because the times are compared over the ranks.
        """
        phases = [self._seconds[name] for name in PHASES[:-1]]
        return process_group.max_over_ranks([*phases, self._total - sum(phases), self._total])
