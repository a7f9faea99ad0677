"""Checks that all ranks have the same input, and errors that all ranks raise together.

Ranks that differ would train a model that nobody asked for, or wait for each other in a collective until it times out.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selfgen_ds.errors import InputError
from selfgen_ds.ranks import process_group


def check_ranks(facts: dict[str, Any]) -> None:
    """Check that facts are the same on all ranks.

    Collective: every rank must call this, because each compares the facts of all ranks.

    Args:
        facts: Values by name, which can be pickled.

    Raises:
        InputError: A value differs. The line names a rank whose value differs from rank 0's, and its host. All ranks
            raise the same error.
    """
    gathered = process_group.all_gather_object((socket.gethostname(), facts))
    first_host, first = gathered[0]
    lines: dict[str, str] = {}
    for rank, (host, values) in enumerate(gathered[1:], start=1):
        for name in sorted(first.keys() | values.keys()):
            if values.get(name) != first.get(name):
                expected = f"{first.get(name)!r} on rank 0 on {first_host}"
                lines.setdefault(name, f"{name}: {values.get(name)!r} on rank {rank} on {host}, {expected}")
    if lines:
        raise InputError("\n".join(lines.values()))


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise the `InputError` of any rank on all ranks, so that all of them end instead of waiting for the failed one.

    Collective: every rank must enter and leave this context. If there are several hosts, a line that only some ranks
    have names a rank and its host.

    Raises:
        InputError: The body raised an `InputError` on at least one rank.
    """
    problem = None
    try:
        yield
    except InputError as error:
        problem = str(error)
    gathered = process_group.all_gather_object((socket.gethostname(), problem))
    if all(other == problem for _, other in gathered):
        if problem is not None:
            raise InputError(problem)
        return
    lines: dict[str, str] = {}
    several_hosts = len({host for host, _ in gathered}) > 1
    for rank, (host, other) in enumerate(gathered):
        for line in (other or "").splitlines():
            lines.setdefault(line, f"{line} (rank {rank} on {host})" if several_hosts else line)
    raise InputError("\n".join(lines.values()))
