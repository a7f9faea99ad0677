"""Ranks that watch each other, so that a lost one ends the run at once, with a line that names it.

A collective whose peer was killed raises an error that names nobody; one whose peer lost its network waits for ever.
So a thread of every rank gives a sign of life once a second through the process group's store, on a connection of its
own, and reads there what became of the others. Rank 0 counts them all, everyone else rank 0 alone; processes on one
machine look whether the others there exist. The first who notices writes a verdict, on which all ranks end.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import psutil
import torch.distributed as dist

from selfgen_ds.ranks.signals import STOPPED

_BEAT = 1.0  # seconds
_SILENCE = 30.0  # seconds without a sign of life after which a rank counts as lost
_AWAY = 5.0  # seconds without a beat of its own after which a process counts as having been stopped
_LEFT = b"left"
_ALONE = 10.0  # seconds in which all leave, once one has
_READ_WITHIN = 2 * _BEAT  # seconds in which all ranks have read a verdict
_COLLECTED_AFTER = 5.0  # seconds in which all ranks have noticed a stall


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs."""

    rank: int
    host: str
    machine: str
    """The same for processes that see each other's process ids."""
    pid: int

    @classmethod
    def here(cls, rank: int) -> Place:
        boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        machine = f"{boot.read_text().strip()} {os.readlink(processes)}" if boot.exists() else ""
        return cls(rank=rank, host=socket.gethostname(), machine=machine, pid=os.getpid())

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def exists(self) -> bool:
        """Whether its process does; asked on the same machine."""
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class Heartbeat:
    """A rank's signs of life, and what it makes of the others'.

    Args:
        store: Of the process group.
        prefix: Of what this writes there.
        keeps_store: Whether the store is in this process.
    """

    def __init__(self, store: dist.TCPStore, prefix: str, rank: int, world_size: int, keeps_store: bool) -> None:
        self._store = dist.PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]
        self._keeps_store = keeps_store
        self.place = Place.here(rank)
        self._store.set(f"beat/{rank}", "0 0")
        self._store.set(f"place/{rank}", json.dumps(asdict(self.place)))
        found = self._store.multi_get([f"place/{other}" for other in range(world_size)])
        self._store.set_timeout(timedelta(seconds=_SILENCE))  # up to here the ranks were still coming
        self.places = [Place(**json.loads(place)) for place in found]
        others = [place for place in self.places if place.rank != rank]
        self._siblings = [p for p in others if (p.machine, p.host) == (self.place.machine, self.place.host)]
        self._watched = others if rank == 0 else self.places[:1]
        started = time.monotonic()
        self._seen = {place.rank: (b"", started) for place in self._watched}
        self._answered = self._looked = started
        self._beats = self._forwards = self._all_forwards = 0
        self._verdict: tuple[str, int] | None = None
        self._stall: tuple[str, float] | None = None
        self._last_words = ""
        self._leaving, self._posted = threading.Event(), threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="heartbeat guard", daemon=True).start()

    def end_all(self, why: str, code: int = 1) -> None:
        """Make all other ranks end, with this line and exit code. Returns when they can read it."""
        self._verdict = why, code
        self._wake.set()
        self._posted.wait(_SILENCE)
        self._let_others_read()

    def fail(self, error: BaseException) -> NoReturn:
        """End this rank with an error, and tell the others; or, if it is theirs, with the line that says whose.

        A rank that fails in a collective has usually lost a peer: it waits until that is known.
        """
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            self._thread.join(2 * _SILENCE)  # ends here if a rank is missing
        traceback.print_exception(error)
        line = f"{self.place} failed: {type(error).__name__}: {_first_line(error)}"
        _say(f"error: {line}")
        self.end_all(line)
        os._exit(1)  # without clean-up: others may be in a collective

    def stalled(self, where: str) -> None:
        """Let rank 0 say where all ranks are."""
        self._stall = where, time.monotonic() + _COLLECTED_AFTER

    def forwards_of_all(self, forwards: int) -> int:
        """Tell the others how many forwards this rank's model has made; the sum over all ranks, a little late."""
        self._forwards = forwards
        return self._all_forwards

    def leave(self, why: str) -> None:
        """This rank is done. The one that keeps the store waits for the others to be, a while.

        Args:
            why: What others tell who find themselves alone.
        """
        self._last_words = why
        self._leaving.set()
        self._wake.set()
        self._thread.join(_SILENCE)

    def _run(self) -> None:
        while True:
            leaving = self._leaving.is_set()
            try:
                over = self._beat(leaving)
            except dist.DistError as error:
                if not leaving:
                    self._end(f"{self.places[0]} is gone: the connection to it broke ({_first_line(error)})")
                over = True
            self._answered = time.monotonic()
            if over:
                return
            self._wake.wait(_BEAT)
            self._wake.clear()

    def _beat(self, leaving: bool) -> bool:
        """One sign of life and one look at the others; whether it was the last."""
        self._beats += 1
        rank = self.place.rank
        if leaving:
            self._store.set(f"why/{rank}", self._last_words)
        # of rank 0, which hears of everyone, for all to read
        forwards = self._all_forwards if rank == 0 else self._forwards
        self._store.set(f"beat/{rank}", _LEFT.decode() if leaving else f"{self._beats} {forwards}")
        if self._verdict is not None:
            why, code = self._verdict
            self._store.compare_set("verdict", "", json.dumps([why, code]))
            self._posted.set()
            return True
        if leaving and not self._keeps_store:
            return True
        if self._store.check(["verdict"]):
            if leaving:
                self._let_others_read()
                return True
            why, code = json.loads(self._store.get("verdict"))
            self._end(why, code)
        gone = [place for place in self._siblings if not place.exists()]
        silent = self._silent()
        for place, how in [(p, "is gone: its process died") for p in gone] + [
            (p, f"is gone: no sign of life for {_SILENCE:.0f} s") for p in silent
        ]:
            if self._store.get(f"beat/{place.rank}") != _LEFT:
                self._store.compare_set("verdict", "", json.dumps([f"{place} {how}", 1]))
        if not leaving and (first := self._has_left_alone()) is not None:
            why = self._store.get(f"why/{first.rank}").decode()
            self._store.compare_set("verdict", "", json.dumps([f"{first} has ended without the others: {why}", 1]))
        self._tell_stall()
        return leaving and all(beat == _LEFT for beat, _ in self._seen.values())

    def _silent(self) -> list[Place]:
        now = time.monotonic()
        if now - self._looked > _AWAY:  # all may have been stopped together, as a scheduler does
            self._seen = {rank: (beat, now) for rank, (beat, _) in self._seen.items()}
        self._looked = now
        beats = self._store.multi_get([f"beat/{place.rank}" for place in self._watched])
        for place, beat in zip(self._watched, beats, strict=True):
            if beat != self._seen[place.rank][0]:
                self._seen[place.rank] = (beat, now)
        others = sum(int(beat.split()[1]) for beat in beats if beat != _LEFT)
        self._all_forwards = others + self._forwards if self.place.rank == 0 else others
        return [place for place in self._watched if now - self._seen[place.rank][1] > _SILENCE]

    def _has_left_alone(self) -> Place | None:
        now = time.monotonic()
        left = [p for p in self._watched if self._seen[p.rank][0] == _LEFT and now - self._seen[p.rank][1] > _ALONE]
        return left[0] if left else None

    def _tell_stall(self) -> None:
        if self._stall is None:
            return
        where, until = self._stall
        self._store.set(f"stall/{self.place.rank}", where)
        if time.monotonic() < until:
            return
        self._stall = None
        if self.place.rank == 0:
            keys = [f"stall/{place.rank}" for place in self.places]
            there = [self._store.get(key).decode() if self._store.check([key]) else "tells nothing" for key in keys]
            for key in keys:  # another stall is another story
                self._store.delete_key(key)
            for what, count in Counter(there).most_common():
                ranks = [str(place) for place, its in zip(self.places, there, strict=True) if its == what]
                named = ", ".join(ranks[:4]) + (f" and {count - 4} more" if count > 4 else "")
                _say(f"stalled: {named}: {what}")

    def _guard(self) -> None:
        """The store's answers may be waited for in vain, where no other thread can tell."""
        looked = time.monotonic()
        while self._thread.is_alive():
            now = time.monotonic()
            if now - looked > _AWAY:
                self._answered = now
            looked = now
            if now - self._answered > 1.5 * _SILENCE and not self._leaving.is_set():
                self._end(f"{self.places[0]} is gone: no answer for {1.5 * _SILENCE:.0f} s")
            time.sleep(_BEAT)

    def _end(self, why: str, code: int = 1) -> NoReturn:
        """Without clean-up: the main thread may wait in a collective."""
        _say(f"{'' if code == STOPPED else 'error: '}{why}; {self.place} ends")
        self._let_others_read()
        os._exit(code)

    def _let_others_read(self) -> None:
        if self._keeps_store:
            time.sleep(_READ_WITHIN)


def _say(line: str) -> None:
    sys.stderr.write(f"selfgen-ds: {line}\n")
    sys.stderr.flush()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
