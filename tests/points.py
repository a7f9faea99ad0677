"""Points of a program at which a process is killed, receives a signal, or hangs."""

from __future__ import annotations

import functools
import importlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from selfgen_ds.ranks import process_group

When = Literal["before", "during", "after"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A call of a function at which something happens to a rank."""

    function: str
    """The function, as `module:name` or `module:class.name`, under the name by which it is called."""
    call: int = 1
    """The number of the call, from 1, counted from the time when the heartbeat beats.

    The launcher alone handles ranks that are lost earlier.
    """
    inside: str | None = None
    """A function: only calls that are made during a call of it are counted. None: all calls are counted."""
    when: When = "before"
    """`during` means: of `torch.save`, when half of the file is written; of any other call, after `delay` seconds."""
    delay: float = 0.0
    signal: signal.Signals | None = signal.SIGKILL
    """The signal that the rank receives; None: the rank hangs."""


def arm(point: Point) -> None:
    """Replace the point's function, so that the point happens to this process."""
    original, put = _find(point.function)
    calls, inside = 0, point.inside is None

    @functools.wraps(original)
    def broken(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += inside and process_group.heartbeat is not None
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


def count(functions: Iterable[str]) -> Callable[[], dict[str, int]]:
    """Count the calls of functions from now on.

    Returns:
        A function that returns the counts so far, by function.
    """
    calls = dict.fromkeys(functions, 0)
    for name in calls:
        original, put = _find(name)

        def counting(*arguments: Any, original: Any = original, name: str = name, **options: Any) -> Any:
            calls[name] += process_group.heartbeat is not None
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
        time.sleep(600)  # SIGKILL may take a moment to arrive; the next line must not run
