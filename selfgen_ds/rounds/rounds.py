"""The rounds of BASH and RAC: what the model drew at a round's start, and the windows over it.

A round is drawn chunk by chunk, every rank its own, into `rollouts/round-01/` (`store.py`). A run that was
killed goes on at the first chunk that is missing; a round that is complete is never drawn again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from selfgen_ds import __version__
from selfgen_ds.data.batches import Rows, StepBatches
from selfgen_ds.data.samples import Sample, Samples
from selfgen_ds.data.stored_row import StoredRow
from selfgen_ds.errors import InputError
from selfgen_ds.files import write_atomically
from selfgen_ds.methods.method import RoundMethod
from selfgen_ds.model.checksum import weights_checksum
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import raise_on_all_ranks
from selfgen_ds.rounds.store import StoredRows, Writer, broken_files, load_table, read_audit

log = logging.getLogger("selfgen_ds")

_SHARED = "shared.json"

_CHUNK = 256  # samples that a rank draws before it writes them, at most
_CHUNKS = 32  # of every rank, so that a round shows its progress and a killed one has something to go on with ...
_FEW_CHUNKS = 4  # ... but less where a chunk would be little to generate at once


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What contexts are drawn from; those of another model, tokenizer or data set are no use."""

    model: str
    """Checksum of the weights that the run started with."""
    tokenizer: str
    data: str


class Rounds:
    """The windows of a method that has rounds.

    Args:
        windows: Of the data set itself.
        folder: `rollouts/` of the run.
        shared: `rollouts/` of another run, whose rounds are read instead of drawn.
        settings: Those that the method reads, for the record.
        step: That the run stands at; rounds before it are not looked at.
        poll: Called after every chunk, on all ranks; what it raises leaves the chunks for the next start.

    Raises:
        InputError: A complete round was drawn from something else, is damaged, or has rows that are too long.
    """

    def __init__(
        self,
        *,
        engine: deepspeed.DeepSpeedEngine,
        policy: EnginePolicy,
        method: RoundMethod,
        samples: list[Samples],
        windows: StepBatches,
        folder: Path,
        shared: Path | None,
        fingerprint: Fingerprint,
        settings: dict[str, Any],
        step: int,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._policy, self._method = engine, policy, method
        self._samples, self._plain = samples, windows
        self._folder, self._shared = folder, shared
        self._fingerprint, self._settings = fingerprint, settings
        self._poll = poll
        self._ends = np.cumsum([len(source) for source in samples])
        self._windows = windows
        self.number = -1
        """The current round, from 0."""
        self.replace_probability = 0.0
        """p that it was drawn with."""
        needed = range(method.round_of(step), method.rounds)
        self._theirs = self._shared_rounds(needed)
        for setting, complete in {"output_dir": _complete(folder), "selfgen.rollouts": self._theirs}.items():
            for drawn in complete:
                if _number(drawn) in needed:
                    self._check(setting, drawn)
        if shared and process_group.rank() == 0 and not (folder / _SHARED).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / _SHARED, json.dumps([drawn.name for drawn in self._theirs]))

    def _shared_rounds(self, needed: range) -> list[Path]:
        """The other run's rounds that were there at this run's first start; later ones would change what it resumes."""
        if self._shared is None:
            return []
        found = _complete(self._shared)
        if (record := self._folder / _SHARED).exists():
            names = json.loads(record.read_text(encoding="utf-8"))
            found = [drawn for drawn in found if drawn.name in names]
            for gone in sorted(set(names) - {drawn.name for drawn in found}):
                if _number(self._shared / gone) in needed:
                    log.warning("%s is gone: the round is drawn here", self._shared / gone)
        elif not self._shared.is_dir():
            raise InputError(
                f"selfgen.rollouts: expected an existing folder, another run's `rollouts`, got {str(self._shared)!r}"
            )
        elif not found:
            raise InputError(f"selfgen.rollouts: {self._shared} holds no round, such as {_name(0)}")
        read = [drawn.name for drawn in found if _number(drawn) in needed]
        log.info("of %d rounds from here on %s are read from %s", len(needed), ", ".join(read) or "none", self._shared)
        return found

    def starts(self, step: int) -> bool:
        """Whether a round starts with this step."""
        return step > 0 and self._method.round_of(step) != self._method.round_of(step - 1)

    def windows(self, step: int) -> StepBatches:
        """The windows of the step's round, which is drawn if it has not been yet. Collective."""
        number = self._method.round_of(step)
        if self.number != number:
            folder = self._find(number, step) or self._draw(number, step)
            steps = range(self._method.first_step(number), self._method.first_step(number + 1))
            with raise_on_all_ranks():
                table, probability = load_table(folder), read_audit(folder)["replace_probability"]
            self._windows = self._plain.over(self._rows(table, number), steps)
            self.number, self.replace_probability = number, probability
        return self._windows

    def _find(self, number: int, step: int) -> Path | None:
        """A complete round, by rank 0's view: its own, or the other run's. Collective."""
        found: list[Path | None] = [None]
        if dist.get_rank() == 0:
            own = self._folder / _name(number)
            theirs = next((drawn for drawn in self._theirs if drawn.name == own.name), None)
            found = [own if own.is_dir() else theirs]
        dist.broadcast_object_list(found, src=0)
        is_own = found[0] is not None and found[0].parent == self._folder
        if is_own and step == self._method.first_step(number):
            weights = weights_checksum(self._engine)
            with raise_on_all_ranks():
                there = read_audit(self._folder / _name(number))["fingerprint"]["weights"]
            if there != weights:
                log.warning("%s was drawn by other weights than now", found[0])
        return found[0]

    def _check(self, setting: str, folder: Path) -> None:
        audit = read_audit(folder)
        theirs, ours = audit.get("fingerprint", {}), vars(self._fingerprint)
        if audit.get("method") != self._settings["method"]:
            by = f"by {audit.get('method')}, not by {self._settings['method']}"
            raise InputError(f"{setting}: {folder} was drawn {by}")
        for what, value in ours.items():
            if (there := theirs.get(what)) != value:
                name = {"model": "starting model"}.get(what, what)
                raise InputError(f"{setting}: {folder} was drawn from another {name}: {there} there, {value} here")
        if process_group.rank() != 0:
            return
        if broken := broken_files(folder):
            raise InputError(
                f"{setting}: {folder} is broken ({', '.join(broken)}); without it the round is drawn again"
            )
        drawn_with = audit.get("settings", {})
        others = [
            f"{name} {value!r} there, {self._settings.get(name)!r} here"
            for name, value in drawn_with.items()
            if self._settings.get(name) != value
        ]
        if others:
            log.warning("%s was drawn with other settings: %s", folder, ", ".join(others))
        table, most = load_table(folder), self._method.plan.max_length
        places = np.arange(len(table))
        if (longest := StoredRows(table, places).lengths(places).max(initial=0)) > most:
            raise InputError(f"{setting}: {folder} has rows of {longest} tokens, more than data.max_length={most}")

    def _draw(self, number: int, step: int) -> Path:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        audit = self._audit(number, step)
        writer = Writer(self._folder / _name(number))
        agreed: list[Any] = [None]
        if rank == 0:
            audit, superseded = writer.start(audit)
            if superseded:
                log.warning("%s was begun by other weights or settings and is drawn anew", writer.partial)
            chunks = -(-int(self._ends[-1]) // audit["chunk_size"])
            agreed = [(audit, chunks, writer.missing(chunks))]
        dist.broadcast_object_list(agreed, src=0)
        audit, chunks, missing = agreed[0]
        if step != self._method.first_step(number):
            log.warning(
                "%s is gone, and is drawn anew in the middle of the round: the run will be another", writer.folder
            )
        if self._shared is not None:
            log.warning("%s holds no %s: it is drawn here", self._shared, _name(number))
        log.info("round %d of %d: drawing %d of %d chunks", number + 1, self._method.rounds, len(missing), chunks)
        began = time.perf_counter()
        with (
            self._policy.gathered(self._method.longest),
            tqdm(desc=f"round {number + 1}", total=len(missing), unit="chunk", leave=False, disable=rank != 0) as bar,
        ):
            for first in range(0, len(missing), world_size):
                mine = missing[first + rank : first + rank + 1]
                samples = [sample for chunk in mine for sample in self._chunk(chunk, audit["chunk_size"])]
                rows, counts = self._method.rows(samples, self._policy, number)
                # no rank gets further ahead than a chunk: the process group's timeout counts what others wait
                problem = self._problem(samples, rows)
                if self._policy.max_over_ranks(int(problem is not None)):
                    where = problem or "those of another rank"
                    raise RuntimeError(f"{self._settings['method']}: its rows do not fit the samples: {where}")
                for chunk in mine:
                    writer.write(chunk, rows, counts)
                bar.update(min(world_size, len(missing) - first))
                self._poll()
        dist.barrier()
        if rank == 0:
            seconds = time.perf_counter() - began
            audit = writer.finish(chunks, audit | {"seconds_of_last_start": round(seconds, 3)})
            told = ", ".join(f"{n} {what}" for what, n in (audit["counts"] | {"passes": audit["passes"]}).items() if n)
            log.info("round %d: %s, in %.1f s", number + 1, told, seconds)
        dist.barrier()
        return writer.folder

    def _problem(self, samples: list[Sample], rows: list[StoredRow]) -> str | None:
        """What is wrong with a method's rows."""
        most = self._method.plan.max_length
        for row in rows:
            arrays = (row.context_ids, row.target_ids, row.loss_mask, row.replaced_mask)
            if len({len(array) for array in arrays}) > 1:
                return f"sample {row.sample_id} has arrays of several lengths"
            if len(row.context_ids) > most:
                return f"sample {row.sample_id} has {len(row.context_ids)} tokens, more than data.max_length={most}"
        ids, row_ids = [sample.sample_id for sample in samples], [row.sample_id for row in rows]
        if self._method.keeps_lengths:
            if row_ids != ids:
                return f"samples {ids[:5]} ... have become rows of {row_ids[:5]} ..., as {len(ids)} and {len(row_ids)}"
            for sample, row in zip(samples, rows, strict=True):
                if len(row.context_ids) != len(sample.input_ids):
                    return f"sample {row.sample_id} has become longer or shorter, against `keeps_lengths`"
        elif row_ids != sorted(row_ids) or not set(row_ids) <= set(ids):
            return f"rows of {row_ids[:5]} ... are none of samples {ids[:5]} ..., or in another order"
        return None

    def _audit(self, number: int, step: int) -> dict[str, Any]:
        """What draws a round, for the record. Collective."""
        mine = -(-int(self._ends[-1]) // dist.get_world_size())  # samples of a rank
        return {
            "method": self._settings["method"],
            "round": number + 1,
            "step": step,
            "replace_probability": self._method.replace_probability(step),
            "settings": self._settings,
            "fingerprint": vars(self._fingerprint) | {"weights": weights_checksum(self._engine)},
            "versions": {
                "selfgen_ds": __version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "deepspeed": deepspeed.__version__,
            },
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "chunk_size": _chunk_size(mine, self._policy.rows_at_once),
        }

    def _chunk(self, chunk: int, chunk_size: int) -> list[Sample]:
        found = []
        for place in range(chunk * chunk_size, min((chunk + 1) * chunk_size, int(self._ends[-1]))):
            source = int(np.searchsorted(self._ends, place, side="right"))
            found.append(self._samples[source][place - int(self._ends[source]) + len(self._samples[source])])
        return found

    def _rows(self, table: datasets.Dataset, number: int) -> Sequence[Rows]:
        """The round's rows by source."""
        sample_ids = table.data.column("sample_id").to_numpy()
        equal = table.data.column("answer_equal").to_numpy()
        edges = np.searchsorted(sample_ids, [source.first_id for source in self._samples[1:]])
        rows: list[Rows] = []
        for source, places in zip(self._samples, np.split(np.arange(len(table)), edges), strict=True):
            if not len(places):
                raise RuntimeError(f"{self._settings['method']}: round {number + 1} has no row of {source.name}")
            chosen = places[self._method.select(sample_ids[places], equal[places], number)]
            if not len(chosen):
                log.warning("round %d: no row of %s is selected (`select`); all are kept", number + 1, source.name)
                chosen = places
            rows.append(StoredRows(table, chosen))
        return rows


def _chunk_size(samples: int, rows_at_once: int) -> int:
    """Samples of a chunk, of so many of a rank. Half of them may be plain, and the others be generated at once."""
    least = min(2 * rows_at_once, -(-samples // _FEW_CHUNKS))
    return max(min(_CHUNK, -(-samples // _CHUNKS)), least)


def _complete(root: Path) -> list[Path]:
    """The complete rounds in a folder."""
    found = [folder for folder in root.glob("round-*") if folder.name.removeprefix("round-").isdigit()]
    return sorted(found, key=_number)


def _name(number: int) -> str:
    return f"round-{number + 1:02d}"


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("round-")) - 1
