"""The rounds of a method such as `bash` or `rac`: drawn when they start, then trained on instead of the data set.

The ranks draw different chunks of a round and write them to `rollouts/round-01/` (`store.py`). A run that was killed
continues at the first missing chunk, and a complete round is never drawn again.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import numpy as np
import torch.distributed as dist

from selfgen_ds import __version__
from selfgen_ds.data.batches import Rows, StepBatches
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.samples import Samples
from selfgen_ds.errors import InputError
from selfgen_ds.files import write_atomically
from selfgen_ds.methods.method import RoundMethod
from selfgen_ds.model.checksum import weights_checksum
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.progress import bar
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import raise_on_all_ranks
from selfgen_ds.rounds.checks import check_round, rows_problem
from selfgen_ds.rounds.command import AnswerCommand
from selfgen_ds.rounds.store import StoredRows, Writer, load_table, read_audit
from selfgen_ds.versions import libraries

log = logging.getLogger("selfgen_ds")

Draw = Callable[[list[TrainingRow]], tuple[list[TrainingRow], dict[str, int]]]
"""`samples -> (rows, counts)`: the rows that a round trains on instead of some samples, and counts for its record."""

_SHARED = "shared.json"

_CHUNK = 256
"""Most samples of a chunk, unless more can be generated at once."""
_CHUNKS = 32
"""Fewest chunks per rank in a round. Progress is shown by chunks, and a killed round loses at most one per rank."""
_FEW_CHUNKS = 4
"""Fewest chunks per rank if smaller chunks had fewer rows than can be generated at once."""


@dataclass(frozen=True, kw_only=True)
class RoundFacts:
    """What the metrics of a step say of its round."""

    number: int
    """The round, from 0."""
    replace_probability: float
    """p that it was drawn with."""
    differing_share: float
    """Share of its drawn tokens that differ from the reference."""
    read_tokens: int
    """Tokens that the model read on all ranks to draw it; 0 but at the step that counts them."""
    seconds: float
    """Time of drawing it; 0 but at the step that counts it."""


@dataclass(kw_only=True, eq=False)
class Rounds:
    """Gives the step batches of each round, and draws the rounds that are not drawn yet."""

    engine: deepspeed.DeepSpeedEngine
    policy: EnginePolicy
    method: RoundMethod
    samples: list[Samples]
    plain: StepBatches
    """Batches of the data set itself."""
    folder: Path
    """`rollouts/` of the run."""
    shared: Path | None
    """`rollouts/` of another run, whose rounds are read instead of drawn."""
    fingerprint: dict[str, str]
    """Checksums of the weights that the run started with (`model`), of the `tokenizer`, and of the training rows
    (`data`). Contexts of another model, tokenizer, or data set cannot be used."""
    settings: dict[str, Any]
    """The settings that the method reads, for the record."""
    step: int
    """Optimizer steps already done. Rounds that ended before are not checked."""
    command: AnswerCommand | None = None
    """The user's command that gives the answers of a round; None if the policy does."""
    poll: Callable[[], None] = lambda: None
    """Called on all ranks after every chunk. If it raises, the next start continues with the chunks drawn so far."""

    def __post_init__(self) -> None:
        self._ends = np.cumsum([len(source) for source in self.samples])
        self._step_batches = self.plain
        self._shared_folders: list[Path] = []
        self.number = -1
        """Number of the current round, from 0; -1 before the first."""
        self._audit_of_round: dict[str, Any] = {}
        self._counted_at = -1

    def open(self) -> Rounds:
        """Check the complete rounds that the run still needs, its own and the other run's; return the object itself.

        Raises:
            InputError: A round was drawn from something else, is damaged, or has rows that are too long; or the other
                run has no complete round.
        """
        needed = range(self.method.round_of(self.step), self.method.rounds)
        self._shared_folders = self._shared_rounds(needed)
        complete = {"output_dir": _complete(self.folder), "selfgen.rollouts": self._shared_folders}
        for setting, folders in complete.items():
            for drawn in folders:
                if _number(drawn) in needed:
                    check_round(setting, drawn, self.fingerprint, self.settings, self.method.plan.max_length)
        if self.shared and process_group.rank() == 0 and not (self.folder / _SHARED).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / _SHARED, json.dumps([drawn.name for drawn in self._shared_folders]))
        return self

    def _shared_rounds(self, needed: range) -> list[Path]:
        """Return the rounds of the other run that existed when this run first started.

        A later round is drawn here even if the other run has it by now; otherwise a resumed run would differ.
        """
        if self.shared is None:
            return []
        complete = _complete(self.shared)
        if (record := self.folder / _SHARED).exists():
            names = json.loads(record.read_text(encoding="utf-8"))
            complete = [drawn for drawn in complete if drawn.name in names]
            for gone in sorted(set(names) - {drawn.name for drawn in complete}):
                if _number(self.shared / gone) in needed:
                    log.warning("%s no longer exists; drawing this round here", self.shared / gone)
        elif not self.shared.is_dir():
            raise InputError(
                f"selfgen.rollouts: expected an existing folder, another run's `rollouts`, got {str(self.shared)!r}"
            )
        elif not complete:
            raise InputError(f"selfgen.rollouts: {self.shared} holds no complete round, such as {_name(0)}")
        read = ", ".join(drawn.name for drawn in complete if _number(drawn) in needed)
        log.info("reading rounds %s from %s, of the %d rounds still to come", read or "none", self.shared, len(needed))
        return complete

    def starts(self, step: int) -> bool:
        """Return whether a round starts with this step."""
        return step > 0 and self.method.round_of(step) != self.method.round_of(step - 1)

    def step_batches(self, step: int) -> StepBatches:
        """Return the batches of the step's round, which is drawn if it is not complete.

        Collective: every rank must call this, because all ranks draw a round together.
        """
        number = self.method.round_of(step)
        if self.number != number:
            found = self._find(number, step)
            folder = found or self._draw(number, step)
            steps = range(self.method.first_step(number), self.method.first_step(number + 1))
            with raise_on_all_ranks():
                table, self._audit_of_round = load_table(folder), read_audit(folder)
            self._step_batches = self.plain.with_rows(self._rows(table, number), steps)
            self.number = number
            if found is None or step == steps.start:
                self._counted_at = step
        return self._step_batches

    def facts(self, step: int) -> RoundFacts:
        """Return what the metrics of a step say of its round, which `step_batches` has opened.

        The cost of drawing it belongs to its first step, whichever process or run has drawn it.
        """
        audit, counted = self._audit_of_round, step == self._counted_at
        counts = audit["counts"]
        return RoundFacts(
            number=self.number,
            replace_probability=audit["replace_probability"],
            differing_share=counts["differing_tokens"] / max(1, counts["drawn_tokens"]),
            read_tokens=counts.get("no_grad_tokens", 0) if counted else 0,
            seconds=audit.get("seconds", 0.0) if counted else 0.0,
        )

    def _find(self, number: int, step: int) -> Path | None:
        """Return the folder of a complete round, of this run or of the other run, or None if there is none.

        Collective: every rank must call this. Rank 0 looks, so that all ranks read the same folder.
        """
        own = self.folder / _name(number)
        shared = next((drawn for drawn in self._shared_folders if drawn.name == own.name), None)
        folder = process_group.from_rank_0(lambda: own if own.is_dir() else shared)
        if folder is not None and folder.parent == self.folder and step == self.method.first_step(number):
            weights = weights_checksum(self.engine)
            with raise_on_all_ranks():
                drawn_by = read_audit(folder)["fingerprint"]["weights"]
            if drawn_by != weights:
                log.warning("%s was drawn by other weights than the current ones", folder)
        return folder

    def _draw(self, number: int, step: int) -> Path:
        """Draw the missing chunks of a round and complete it; return its folder.

        Collective: every rank must call this, because the method asks the policy.
        """
        writer, audit = Writer(self.folder / _name(number)), self._audit(number, step)
        audit = process_group.from_rank_0(lambda: writer.start(audit))
        chunks = -(-int(self._ends[-1]) // audit["chunk_size"])
        missing = process_group.from_rank_0(lambda: writer.missing(chunks))
        if step != self.method.first_step(number):
            told = "%s no longer exists; drawing it again with the weights of step %d: the run will not be the same"
            log.warning(told, writer.folder, step)
        if self.shared is not None:
            log.warning("%s holds no %s; drawing it here", self.shared, _name(number))
        log.info("round %d of %d: drawing %d of %d chunks", number + 1, self.method.rounds, len(missing), chunks)
        if unread := _unread(self.method, number):
            told = "round %d is drawn for all %d rows of an epoch, and the run ends before it reads %d of them"
            log.warning(told, number + 1, self.method.plan.epoch_size, unread)
        self._draw_chunks(number, missing, audit["chunk_size"], writer)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(_command_folder(writer), ignore_errors=True)
            audit = writer.finish(chunks, audit)
            counts = audit["counts"] | {"passes": audit["passes"]}
            told = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n)
            log.info("round %d: %s, in %.1f s", number + 1, told, audit["seconds"])
        dist.barrier()
        return writer.folder

    def _draw_chunks(self, number: int, missing: list[int], chunk_size: int, writer: Writer) -> None:
        """Draw and write chunks of a round, at the same time one on each rank.

        Collective: every rank must call this, because the method asks the policy.

        Raises:
            RuntimeError: The method's rows do not fit the samples on some rank.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        began = time.perf_counter()
        with (
            self._drawer(number, missing, chunk_size, writer) as draw,
            bar(f"round {number + 1}", "chunk", total=len(missing), leave=False, disable=rank != 0) as progress,
        ):
            for first in range(0, len(missing), world_size):
                own = missing[first + rank : first + rank + 1]
                samples = [sample for chunk in own for sample in self._chunk(chunk, chunk_size)]
                rows, counts = draw(samples)
                # Every rank waits here, so that no rank is more than a chunk ahead: the time that ranks wait for each
                # other must stay below the timeout of the process group.
                problems = process_group.all_gather_object(rows_problem(self.method, samples, rows))
                if told := "; ".join(f"rank {drawer}: {line}" for drawer, line in enumerate(problems) if line):
                    raise RuntimeError(f"{self.settings['method']}: the rows do not fit the samples: {told}")
                began, before = time.perf_counter(), began
                for chunk in own:
                    writer.write(chunk, rows, counts, (began - before) / min(world_size, len(missing) - first))
                progress.update(min(world_size, len(missing) - first))
                self.poll()

    @contextmanager
    def _drawer(self, number: int, missing: list[int], chunk_size: int, writer: Writer) -> Iterator[Draw]:
        """Give the function that draws the rows of some samples, from the policy or from the command's answers.

        Collective: every rank must enter this, and call the function as often as the others.
        """
        if self.command is None:
            with self.policy.gathered(self.method.longest):
                yield lambda samples: self._rows_by_policy(samples, number)
            return
        command = self.command
        folder = _command_folder(writer)
        answers = command.answer(
            lambda: (self._chunk(chunk, chunk_size) for chunk in missing), number, folder, self.poll
        )
        yield lambda samples: command.rows(samples, answers, number)

    def _rows_by_policy(self, samples: list[TrainingRow], number: int) -> tuple[list[TrainingRow], dict[str, int]]:
        """Return the rows of some samples and counts. Collective: every rank must call this."""
        read_before = self.policy.read_tokens
        rows, counts = self.method.rows(samples, self.policy, number)
        return rows, counts | {"no_grad_tokens": self.policy.read_tokens - read_before}

    def _audit(self, number: int, step: int) -> dict[str, Any]:
        """Return the record of the weights and settings that draw a round.

        Collective: every rank must call this, because all ranks compute the checksum of sharded weights.
        """
        samples_per_rank = -(-int(self._ends[-1]) // dist.get_world_size())
        return {
            "method": self.settings["method"],
            "round": number + 1,
            "step": step,
            "replace_probability": self.method.replace_probability(step),
            "by_command": self.command is not None,
            "settings": self.settings,
            "fingerprint": self.fingerprint | {"weights": weights_checksum(self.engine)},
            "versions": {"selfgen_ds": __version__} | libraries(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "chunk_size": _chunk_size(samples_per_rank, self.policy.rows_at_once),
        }

    def _chunk(self, chunk: int, chunk_size: int) -> list[TrainingRow]:
        """Return the samples of a chunk, which may come from several sources."""
        samples = []
        for number in range(chunk * chunk_size, min((chunk + 1) * chunk_size, int(self._ends[-1]))):
            source = int(np.searchsorted(self._ends, number, side="right"))
            samples.append(self.samples[source][number - int(self._ends[source]) + len(self.samples[source])])
        return samples

    def _rows(self, table: datasets.Dataset, number: int) -> Sequence[Rows]:
        """Return the rows of a round that are trained on, by source."""
        sample_ids = table.data.column("sample_id").to_numpy()
        equal = table.data.column("answer_equal").to_numpy()
        edges = np.searchsorted(sample_ids, [source.first_id for source in self.samples[1:]])
        rows: list[Rows] = []
        for source, numbers in zip(self.samples, np.split(np.arange(len(table)), edges), strict=True):
            if not len(numbers):
                raise RuntimeError(f"{self.settings['method']}: round {number + 1} has no row of {source.name}")
            chosen = numbers[self.method.select(sample_ids[numbers], equal[numbers], number)]
            if self.method.keeps_rows and len(chosen) < len(numbers):
                problem = "`select` leaves rows out, although the method has `keeps_rows = True`"
                raise RuntimeError(f"{self.settings['method']}: {problem}")
            if not len(chosen):
                log.warning("round %d: no row of %s is selected (`select`); all are kept", number + 1, source.name)
                chosen = numbers
            rows.append(StoredRows(table, chosen))
        return rows


def _command_folder(writer: Writer) -> Path:
    """Return the folder for the files of the user's command, inside the folder of the unfinished round."""
    return writer.partial / "command"


def _unread(method: RoundMethod, number: int) -> int:
    """Return the rows of a round that the run ends before it reads, a last step that is not full left aside."""
    plan, first, end = method.plan, method.first_step(number), method.first_step(number + 1)
    read = (plan.total_steps - first) * plan.step_size
    return max(0, plan.epoch_size - read) if end - plan.total_steps > 1 else 0


def _chunk_size(samples: int, rows_at_once: int) -> int:
    """Return the samples of a chunk.

    Args:
        samples: Samples that each rank draws in the round.
        rows_at_once: Rows that a rank generates at once. A chunk has twice as many samples if it can, because half of
            them may be trained on as they are (`selfgen.sft_share`).
    """
    least = min(2 * rows_at_once, -(-samples // _FEW_CHUNKS))
    return max(min(_CHUNK, -(-samples // _CHUNKS)), least)


def _complete(root: Path) -> list[Path]:
    """Return the complete rounds in a folder, in order."""
    folders = [folder for folder in root.glob("round-*") if folder.name.removeprefix("round-").isdigit()]
    return sorted(folders, key=_number)


def _name(number: int) -> str:
    return f"round-{number + 1:02d}"


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("round-")) - 1
