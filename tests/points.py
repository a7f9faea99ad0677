"""Points of a program at which something happens to a process: it is killed, gets a signal, or hangs."""

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

import torch.distributed as dist

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


def count(functions: Iterable[str]) -> Callable[[], dict[str, int]]:
    """Count the calls of functions from here on."""
    calls = dict.fromkeys(functions, 0)
    for name in calls:
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
