"""A thread in every rank that notices lost and stalled ranks, and ends the run with a line that names them.

A collective whose peer was killed raises an error that names nobody; one whose peer lost its network waits for hours.
So every rank writes a beat once a second to the process group's store, over a connection of its own. Rank 0 reads the
beats of all ranks, every other rank reads rank 0's, and the ranks of one host check each other's processes. The first
rank that notices a loss writes a verdict to the store; every rank that reads the verdict prints it and exits.

Time is counted in beats instead of read from a clock: a suspended rank (SIGSTOP, `scontrol suspend`) counts nothing,
so that ranks that were suspended together continue afterwards.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist

from selfgen_ds.files import refusal
from selfgen_ds.progress import line_is_open
from selfgen_ds.ranks.signals import STOPPED

_BEAT = 1.0  # seconds between two beats
_SILENCE = 30  # beats after which a silent rank counts as lost
_ALONE = 10  # beats within which all ranks have to end normally, once one has
_READ_WITHIN = 2 * _BEAT  # seconds within which all ranks have read a verdict


@dataclass(frozen=True, kw_only=True)
class RankProcess:
    """The process of a rank, and the host that the process runs on."""

    rank: int
    host: str
    machine: str
    """Equal for processes that see each other's process ids."""
    pid: int

    @classmethod
    def here(cls, rank: int) -> RankProcess:
        """Return a description of this process."""
        boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        machine = f"{boot.read_text().strip()} {os.readlink(namespace)}" if boot.exists() else ""
        return cls(rank=rank, host=socket.gethostname(), machine=machine, pid=os.getpid())

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def exists(self) -> bool:
        """Return whether the rank's process is alive. Only processes of the same machine can ask."""
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True, kw_only=True)
class StallLimit:
    """How long no rank may make progress in a phase of a run."""

    seconds: float
    """Seconds without a forward or a collective on any rank, after which the ranks print their stacks."""
    setting: str
    """Setting that gives them, for the line that tells of the stall."""


class Heartbeat:
    """The thread that writes this rank's beats and reads the other ranks'.

    Args:
        store: The store of the process group.
        prefix: Prefix of the keys in the store, so that no other run or restart reads them.
        keeps_store: Whether this process runs the store, which the other ranks still need when this rank ends.
    """

    def __init__(self, store: dist.TCPStore, prefix: str, rank: int, world_size: int, keeps_store: bool) -> None:
        self._store = dist.PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]
        self._keeps_store = keeps_store
        self.process = RankProcess.here(rank)
        self.forwards = 0
        """Forwards that this rank's model has made."""
        self.stall_limit: StallLimit | None = None
        """When the run is stalled, as rank 0 has it; None: never."""
        self.flight_record: Path | None = None
        """Folder for torch's record of this rank's last collectives, which is written in a stall; None for none."""
        self._beats, self._stall, self._farewell = 0, "", ""
        self._write_beat("")
        self._store.set(f"process/{rank}", json.dumps(asdict(self.process)))
        processes = self._store.multi_get([f"process/{other}" for other in range(world_size)])
        self._store.set_timeout(timedelta(seconds=_SILENCE))  # the wait for ranks that are still starting is over
        self.processes = [RankProcess(**json.loads(process)) for process in processes]
        others = [process for process in self.processes if process.rank != rank]
        self._siblings = [p for p in others if (p.machine, p.host) == (self.process.machine, self.process.host)]
        self._watched = self.processes if rank == 0 else self.processes[:1]
        # Rank -> its last beat, and the number of beats for which this beat has not changed.
        self._seen = {process.rank: (b"", 0) for process in self.processes}
        self._progress, self._idle = 0, 0
        self._stacks_printed = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="heartbeat guard", daemon=True).start()

    def end_all(self, reason: str, code: int = 1) -> NoReturn:
        """End every rank, this one included, with a line that says the reason, and with an exit code."""
        with suppress(dist.DistError):  # without the store each rank ends by itself
            self._give_verdict(reason, code)
        self._thread.join()  # the thread exits the process when it reads the verdict
        os._exit(code)

    def fail(self, error: BaseException) -> NoReturn:
        """End every rank because this one has raised an error.

        A rank whose collective fails has usually lost a peer. It waits for the verdict that names the peer before it
        blames itself.
        """
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo raises a plain RuntimeError
            self._thread.join(2 * _SILENCE * _BEAT)
        refused = refusal(error)
        if refused is None:
            traceback.print_exception(error)
        self.end_all(f"{self.process} failed: {refused or f'{type(error).__name__}: {_first_line(error)}'}")

    def leave(self, reason: str) -> None:
        """Tell the other ranks that this one is done. The rank that keeps the store waits for them, for half a minute.

        Args:
            reason: Reason that the other ranks print if they are not done.
        """
        self._farewell = reason
        self._wake.set()
        self._thread.join(_SILENCE * _BEAT)

    def _run(self) -> None:
        """Beat once a second until this rank has left."""
        over = False
        while not over:
            farewell = self._farewell  # the main thread may set it at any moment
            try:
                over = self._beat(farewell)
            except dist.DistError as error:
                if not farewell:
                    self._exit(f"{self.processes[0]} is gone: the connection to it broke ({_first_line(error)})")
                return
            self._wake.wait(0 if over else _BEAT)
            self._wake.clear()

    def _beat(self, farewell: str) -> bool:
        """Write a beat, and read the verdict and the other ranks' beats. Return whether this was the last beat."""
        self._write_beat(farewell)
        leaving = bool(farewell)
        if leaving and not self._keeps_store:
            return True
        if self._store.check(["verdict"]):
            reason, code = json.loads(self._store.get("verdict"))
            if not leaving:
                self._exit(reason, code)
            time.sleep(_READ_WITHIN)
            return True
        # Processes are looked at before the beats are read: a process that ends normally has written its farewell.
        gone = [process for process in self._siblings if not process.exists()]
        beats = self._read_beats(list(dict.fromkeys([*self._watched, *gone])))
        for process, beat in beats.items():
            unchanged = self._seen[process.rank][1]
            if not beat["farewell"] and process in gone:
                self._give_verdict(f"{process} is gone: its process died")
            elif not beat["farewell"] and unchanged > _SILENCE:
                self._give_verdict(f"{process} is gone: no sign of life for {_SILENCE} s")
            elif beat["farewell"] and unchanged > _ALONE and not leaving:
                self._give_verdict(f"{process} has ended without the others: {beat['farewell']}")
        if self.process.rank == 0:
            self._look_for_stall(beats)
        self._print_stacks(beats[self.processes[0]]["stall"])
        return leaving and all(beat["farewell"] for beat in beats.values())

    def _write_beat(self, farewell: str) -> None:
        """Write this rank's beat, or its farewell."""
        self._beats += 1
        beat = {
            "number": 0 if farewell else self._beats,  # a farewell stays the same, so that ranks count how old it is
            "forwards": self.forwards,
            "collectives": _collectives_entered(),
            "stall": self._stall,
            "farewell": farewell,
        }
        self._store.set(f"beat/{self.process.rank}", json.dumps(beat))

    def _read_beats(self, processes: list[RankProcess]) -> dict[RankProcess, dict[str, Any]]:
        """Read beats, and count for how long each has not changed."""
        beats = self._store.multi_get([f"beat/{process.rank}" for process in processes])
        for process, beat in zip(processes, beats, strict=True):
            last, unchanged = self._seen[process.rank]
            self._seen[process.rank] = beat, unchanged + 1 if beat == last else 0
        return {process: json.loads(beat) for process, beat in zip(processes, beats, strict=True)}

    def _look_for_stall(self, beats: dict[RankProcess, dict[str, Any]]) -> None:
        """Make all ranks print their stacks when no rank makes progress, through rank 0's beat; end the run later.

        The line names the ranks that have entered the fewest collectives: the others wait for these.
        """
        progress = sum(beat["forwards"] + beat["collectives"] for beat in beats.values())
        limit = self.stall_limit
        self._idle = self._idle + 1 if progress == self._progress and limit is not None else 0
        self._progress = progress
        if limit is None or self._idle * _BEAT <= limit.seconds:
            self._stall = ""
            return
        fewest = min(beat["collectives"] for beat in beats.values())
        behind = [str(process) for process, beat in beats.items() if beat["collectives"] == fewest]
        named = ", ".join(behind[:4]) + (f" and {len(behind) - 4} more" if len(behind) > 4 else "")
        cause = "no rank is behind the others" if len(behind) == len(beats) else f"the others wait for {named}"
        line = f"no rank has made a forward for {self._idle * _BEAT:.0f} s ({limit.setting}); {cause}"
        self._stall = self._stall or line
        if self._idle * _BEAT > 2 * limit.seconds:
            self._give_verdict(line)

    def _print_stacks(self, stall: str) -> None:
        """Print the stacks of all threads once per stall, those included that Python did not start (autograd's)."""
        if stall and not self._stacks_printed:
            _say(f"{self.process}: {stall}; the stacks of this rank:")
            faulthandler.dump_traceback()
            if self.flight_record is not None:
                # In a thread: a file system that does not answer may be the cause of the stall, and must stop no beat.
                path = self.flight_record / f"rank_{self.process.rank}"
                threading.Thread(target=_write_flight_record, args=(path,), daemon=True).start()
        self._stacks_printed = bool(stall)

    def _guard(self) -> None:
        """End this rank when the host of rank 0 is gone, because calls to the store there then wait without a limit."""
        beats, unanswered = 0, 0
        while self._thread.is_alive():
            time.sleep(_BEAT)
            unanswered = unanswered + 1 if self._beats == beats else 0
            beats = self._beats
            if unanswered > 1.5 * _SILENCE and not self._farewell:
                self._exit(f"{self.processes[0]} is gone: no answer for {unanswered} s")

    def _give_verdict(self, reason: str, code: int = 1) -> None:
        """Write the verdict, unless another rank was first."""
        self._store.compare_set("verdict", "", json.dumps([reason, code]))

    def _exit(self, reason: str, code: int = 1) -> NoReturn:
        """Print the reason and exit, without clean-up: the main thread may wait in a collective."""
        _say(f"{'' if code == STOPPED else 'error: '}{reason}; {self.process} ends")
        if self._keeps_store:
            time.sleep(_READ_WITHIN)
        os._exit(code)


def _collectives_entered() -> int:
    """Return the number of collectives that this rank has entered, in all of its process groups."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def _write_flight_record(path: Path) -> None:
    """Write what torch's flight recorder holds, as `torchfrtrace` reads it. NCCL's watchdog would write it too late."""
    record = torch._C._distributed_c10d._dump_fr_trace()  # type: ignore[attr-defined]
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(record)


def _say(line: str) -> None:
    sys.stderr.write(("\n" if line_is_open() else "") + f"selfgen-ds: {line}\n")
    sys.stderr.flush()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
