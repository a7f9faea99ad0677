"""Whether all ranks run the same: others train what nobody asked for, or wait for each other for ever."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selfgen_ds.errors import InputError
from selfgen_ds.ranks import process_group


def check_ranks(facts: dict[str, Any]) -> None:
    """Collective.

    Args:
        facts: What has to be the same on all ranks.

    Raises:
        InputError: Something is not, with a rank and its host: on all ranks.
    """
    everyone = process_group.all_gather_object((socket.gethostname(), facts))
    first_host, first = everyone[0]
    lines: dict[str, str] = {}
    for rank, (host, theirs) in enumerate(everyone[1:], start=1):
        for name in sorted(first.keys() | theirs.keys()):
            if theirs.get(name) != first.get(name):
                ours = f"{first.get(name)!r} on rank 0 on {first_host}"
                lines.setdefault(name, f"{name}: {theirs.get(name)!r} on rank {rank} on {host}, {ours}")
    if lines:
        raise InputError("\n".join(lines.values()))


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Bad input on one rank is bad input on all of them, which say whose it is."""
    mine = None
    try:
        yield
    except InputError as error:
        mine = str(error)
    everyone = process_group.all_gather_object((socket.gethostname(), mine))
    if all(problem == everyone[0][1] for _, problem in everyone):
        if everyone[0][1] is not None:
            raise InputError(everyone[0][1])
        return
    told: dict[str, str] = {}
    for rank, (host, problem) in enumerate(everyone):
        for line in (problem or "").splitlines():
            told.setdefault(line, f"{line} (rank {rank} on {host})")
    raise InputError("\n".join(told.values()))
