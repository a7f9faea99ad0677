"""The answers of a round from a command of the user's, such as an inference engine (`selfgen.generate_command`).

Rank 0 writes prompts, and all ranks the model. The first rank of every host runs the command on its host's share of the
prompts. All other ranks wait: once a second all ranks ask together whether a command has ended and whether a signal has
come, so that no collective times out and no stall is noticed, however long the command takes.

The files are in a folder of the unfinished round: a round that other weights or settings begin removes them with it.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deepspeed.accelerator import get_accelerator

from selfgen_ds.data.row import TrainingRow
from selfgen_ds.errors import InputError
from selfgen_ds.methods.method import AnswerMethod, Question
from selfgen_ds.progress import bar
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import raise_on_all_ranks
from selfgen_ds.rounds.answer_files import AnswerFiles, Answers, question_id, write_answers

log = logging.getLogger("selfgen_ds")

PLACES = ("{model}", "{prompts}", "{answers}")
"""What a command names, and a round replaces by a path."""
_SECONDS = 1.0  # between two looks at the command
_SETTING = "selfgen.generate_command"
_LAUNCHERS = ("OMPI_", "PMI", "TORCHELASTIC_")  # prefixes of their variables
_KEPT = "kept.jsonl"  # good answers of earlier starts
_LAST_LINES = 3  # of a failed command's output, which the error quotes


@dataclass(kw_only=True, eq=False)
class RoundAnswers:
    """The answers of a round, which rank 0 holds."""

    answers: Answers
    """Empty on the other ranks."""

    def to(self, questions: list[Question]) -> list[list[int]]:
        """Return the answers to some questions, in their order. Collective: every rank must call this.

        Args:
            questions: Of this rank; other ranks may have others, or none.
        """
        asked = process_group.gather_object([question_id(question) for question in questions])
        given = process_group.scatter_object([[self.answers[name] for name in names] for names in asked])
        return [ids.tolist() for ids in given]


@dataclass(kw_only=True, eq=False)
class AnswerCommand:
    """Runs the user's command for the rounds of a run."""

    command: str
    """The command with `PLACES` in it."""
    method: AnswerMethod
    files: AnswerFiles
    export: Callable[[Path], None]
    """Writes the current weights as a model folder. Collective: every rank calls it."""

    def answer(
        self, chunks: Callable[[], Iterator[list[TrainingRow]]], number: int, folder: Path, poll: Callable[[], None]
    ) -> RoundAnswers:
        """Return the answers to the questions of a round, those that an earlier start has got included.

        Collective: every rank must call this, because all ranks write the model and wait for the command.

        Args:
            chunks: Returns the samples to ask about.
            folder: Folder for the files of the command.
            poll: Called on all ranks once a second. If it raises, the command is ended, and the next start continues
                with the answers that it has written.

        Raises:
            InputError: The command failed, or its answers are not those that were asked for. Good answers are kept.
        """
        local_ranks = process_group.all_gather_object(process_group.local_rank())
        first_on_host = [rank for rank, local in enumerate(local_ranks) if local == 0]
        kept: Answers = {}
        limits: dict[str, int] = {}
        if process_group.rank() == 0:
            kept, limits = self._ask(chunks, number, folder, len(first_on_host))
        asked = process_group.from_rank_0(lambda: len(limits))
        if asked:
            self.export(folder / "model")
            get_accelerator().empty_cache()  # leaves the command the memory that the trainer does not need
            with_prompts = first_on_host[:asked]
            host = with_prompts.index(process_group.rank()) if process_group.rank() in with_prompts else None
            self._run(folder, host, asked, number, poll)
        with raise_on_all_ranks():
            if limits:
                kept |= self._collect(folder, limits)
                shutil.rmtree(folder / "model")
        return RoundAnswers(answers=kept)

    def rows(
        self, samples: list[TrainingRow], answers: RoundAnswers, number: int
    ) -> tuple[list[TrainingRow], dict[str, int]]:
        """Return the rows that a round trains on instead of some samples, and counts, as a `RoundMethod` does.

        Collective: every rank must call this, because rank 0 hands out the answers.
        """
        questions = self.method.questions(samples, number)
        given = answers.to(questions)
        rows, counts = self.method.rows_of(samples, given, number)
        read = sum(len(question.prompt_ids) for question in questions) + sum(map(len, given))
        return rows, counts | {"no_grad_tokens": read}

    def _ask(
        self, chunks: Callable[[], Iterator[list[TrainingRow]]], number: int, folder: Path, hosts: int
    ) -> tuple[Answers, dict[str, int]]:
        """Write the prompts that have no answer yet, a file for each host. Only one rank may call this.

        Returns:
            The good answers of an earlier start, and the most tokens of each answer that is asked for now.
        """

        def questions() -> Iterator[Question]:
            return (question for samples in chunks() for question in self.method.questions(samples, number))

        most = self.method.max_new_tokens
        limits = {question_id(question): self.files.limit(question, most) for question in questions()}
        folder.mkdir(exist_ok=True)
        written = sorted(folder.glob("answers-*.jsonl"))
        before, _ = self.files.read_answers([folder / _KEPT], limits)
        answers, problems = self.files.read_answers(written, limits)
        kept = before | answers
        if kept or problems:
            told = "round %d: %d of %d answers are there from an earlier start; %d lines are no good answers%s"
            first = f", the first: {problems[0]}" if problems else ""
            log.info(told, number + 1, len(kept), len(limits), len(problems), first)
        write_answers(folder / _KEPT, kept)
        for path in written:
            path.unlink()
        missing = {name: limit for name, limit in limits.items() if name not in kept}
        paths = [_prompts(folder, host) for host in range(hosts)]
        left = (question for question in questions() if question_id(question) in missing)
        self.files.write_prompts(paths, left, most, number)
        return kept, missing

    def _run(self, folder: Path, host: int | None, asked: int, number: int, poll: Callable[[], None]) -> None:
        """Run the command on every host, until all have ended or one has failed.

        Collective: every rank must call this, because all ranks wait together.

        Args:
            host: Number of the host, if this rank runs its command.
            asked: Prompts of all hosts.

        Raises:
            InputError: A command failed.
        """
        process = None if host is None else self._start(folder, host)
        code: int | None = 0
        progress = _Progress(folder)
        shown = bar(f"round {number + 1}", "answer", total=asked, leave=False, disable=process_group.rank() != 0)
        try:
            with shown:
                while True:
                    code = 0 if process is None else process.poll()
                    running, failed = process_group.max_over_ranks([int(code is None), int(bool(code))])
                    if failed or not running:
                        break
                    shown.update(progress.new_answers() if process_group.rank() == 0 else 0)
                    poll()
                    time.sleep(_SECONDS)
        finally:
            if process is not None:
                assert process.stdin is not None
                process.stdin.close()  # the guard ends the command
                process.wait()
        with raise_on_all_ranks():
            if code and host is not None:
                raise InputError(_failure(code, _log(folder, host)))

    def _start(self, folder: Path, host: int) -> subprocess.Popen[bytes]:
        """Start the command on a host's prompts, under a guard that ends it with this process."""
        paths = folder / "model", _prompts(folder, host), _answers(folder, host)
        places = dict(zip(PLACES, map(str, paths), strict=True))
        words = [_filled(word, places) for word in shlex.split(self.command)]
        with open(_log(folder, host), "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "selfgen_ds.rounds.command_guard", *words],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_without_launcher(os.environ),
                start_new_session=True,  # Ctrl-C at the terminal is for the ranks
            )
        log.info("%s: running `%s`; its output goes to %s", _SETTING, shlex.join(words), _log(folder, host))
        return process

    def _collect(self, folder: Path, limits: dict[str, int]) -> Answers:
        """Return the answers that the commands have written. Only one rank may call this.

        Raises:
            InputError: An answer is missing, was not asked for, is given twice, or could not be the model's.
        """
        answers, problems = self.files.read_answers(sorted(folder.glob("answers-*.jsonl")), limits)
        missing = [name for name in limits if name not in answers]
        if not problems and not missing:
            return answers
        told = problems[0] if problems else f"{folder}: the prompt {missing[0]!r} has no answer"
        more = f"; {len(problems) - 1} more lines are no good answers" if len(problems) > 1 else ""
        kept = f"{len(answers)} of {len(limits)} prompts have a good answer, and a new start asks for the others only"
        raise InputError(f"{_SETTING}: {told}{more}; {kept} (the command's output is in {folder}/output-*.txt)")


def _prompts(folder: Path, host: int) -> Path:
    return folder / f"prompts-{host:02d}.jsonl"


def _answers(folder: Path, host: int) -> Path:
    return folder / f"answers-{host:02d}.jsonl"


def _log(folder: Path, host: int) -> Path:
    return folder / f"output-{host:02d}.txt"


def _filled(word: str, places: dict[str, str]) -> str:
    """Return a word of the command with paths in the places of their names."""
    for name, path in places.items():
        word = word.replace(name, path)
    return word


def _without_launcher(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of this process without the launcher's, which would make an engine a rank of the run."""
    own = (*process_group.LAUNCHER_VARIABLES, "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    return {n: value for n, value in variables.items() if n not in own and not n.startswith(_LAUNCHERS)}


def _failure(code: int, path: Path) -> str:
    """Return a line about a command that failed: its exit status and the end of its output."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = " / ".join(line[:300] for line in lines[-_LAST_LINES:]) or "nothing"
    again = "a new start asks only for the answers that are missing"
    return f"{_SETTING}: the command failed with exit status {code}; it last said: {said} (all of it: {path}); {again}"


class _Progress:
    """Counts the lines that the commands of all hosts write.

    Args:
        folder: Folder of the answers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def new_answers(self) -> int:
        """Return the number of lines written since the last call."""
        lines = 0
        for path in self._folder.glob("answers-*.jsonl"):
            with open(path, "rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            self._read[path] = self._read.get(path, 0) + len(new)
            lines += new.count(b"\n")
        return lines
