"""Micro-batches that are made ahead are those of their step, and are ready before they are asked for."""

from __future__ import annotations

from threading import Event, current_thread, main_thread
from typing import Any, cast

import pytest

from selfgen_ds.data.batches import StepBatches
from selfgen_ds.data.prefetch import Prefetch


class Numbers:
    """Batches that are the number of their step, and tell of every step that is made."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.events = [Event() for _ in range(10)]

    def at(self, step: int) -> list[Any]:
        assert current_thread() is not main_thread()
        if step == 9:
            raise OSError("the disk is gone")
        self.made.append(step)
        self.events[step].set()
        return [step]


def of(numbers: Numbers) -> StepBatches:
    return cast(StepBatches, numbers)


def test_the_batches_of_the_next_step_are_made_before_they_are_asked_for() -> None:
    numbers, prefetch = Numbers(), Prefetch()
    assert prefetch.at(of(numbers), 3, more=True).result(30) == [3]
    assert numbers.events[4].wait(30)
    assert prefetch.at(of(numbers), 4, more=False).result(30) == [4]
    assert numbers.made == [3, 4], "each is made once, and none after the last"


def test_other_batches_of_the_same_step_are_made_anew() -> None:
    numbers, others, prefetch = Numbers(), Numbers(), Prefetch()
    prefetch.at(of(numbers), 0, more=True)
    assert prefetch.at(of(others), 1, more=False).result(30) == [1]
    assert others.made == [1]


def test_a_row_that_cannot_be_read_is_told_in_its_own_step() -> None:
    numbers, prefetch = Numbers(), Prefetch()
    assert prefetch.at(of(numbers), 8, more=True).result(30) == [8]
    failed = prefetch.at(of(numbers), 9, more=False)
    with pytest.raises(OSError, match="the disk is gone"):
        failed.result(30)
