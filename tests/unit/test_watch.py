"""The signal handlers of `Watch`."""

from __future__ import annotations

import signal

import pytest

from selfgen_ds.ranks.signals import SIGNALS
from selfgen_ds.ranks.watch import Watch


def test_signals_are_handled_as_before_when_training_has_failed() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError, match="other handlers"):
        fail()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def fail() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Watch(600, saving=60.0):
        if [signal.getsignal(number) for number in SIGNALS] != before:
            raise RuntimeError("other handlers")
