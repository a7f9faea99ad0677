"""The files that `selfgen.generate_command` reads and writes: prompts and answers, one JSON object per line.

docs/engines.md describes both files for users.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from selfgen_ds import hashing
from selfgen_ds.data.encoding import tokenize_plain
from selfgen_ds.files import naming
from selfgen_ds.methods.method import Question
from selfgen_ds.model.policy import Sampling

Answers = dict[str, np.ndarray]
"""Answers by the ids of their questions: `[tokens]` int64 each, up to and with the end token."""


def question_id(question: Question) -> str:
    """Return the id of a question in the files: the number of its sample, and of its answer among that sample's."""
    return f"{question.sample_id}-{question.draw}"


@dataclass(frozen=True, kw_only=True)
class AnswerFiles:
    """Writes prompts, and reads answers as strictly as the model's own answers are made."""

    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    end_tokens: list[int]
    """Tokens that each end an answer."""
    closing_id: int
    """The end token that responses of the data end with: it closes an answer that is given as text."""
    vocabulary: int
    """Embeddings of the model: the ids of its tokens are below this number."""
    positions: int | None
    """Tokens of the longest row that the model can read; None for no limit."""
    seed: int

    def limit(self, question: Question, max_new_tokens: int) -> int:
        """Return the most tokens of an answer: fewer than `max_new_tokens` if the model has no positions for them."""
        room = max_new_tokens if self.positions is None else self.positions - len(question.prompt_ids)
        return min(max_new_tokens, room)

    def write_prompts(self, paths: list[Path], questions: Iterable[Question], max_new_tokens: int, number: int) -> None:
        """Write the prompts of some questions to new files, in turn.

        Args:
            number: The round; the seed of a question is a hash of the run's seed, the round, and the question.
        """
        with ExitStack() as stack:
            files = []
            for path in paths:
                stack.enter_context(naming(path))
                files.append(stack.enter_context(open(path, "w", encoding="utf-8")))
            for question, file in zip(questions, cycle(files), strict=False):
                keys = self.seed, number, question.sample_id, question.draw
                prompt = {
                    "id": question_id(question),
                    "prompt_token_ids": question.prompt_ids,
                    "prompt": self.tokenizer.decode(question.prompt_ids, skip_special_tokens=False),
                    "max_new_tokens": self.limit(question, max_new_tokens),
                    **vars(self.sampling),
                    "stop_token_ids": self.end_tokens,
                    "seed": int(hashing.bits(hashing.ANSWER, *keys)) & (1 << 31) - 1,
                }
                file.write(json.dumps(prompt, ensure_ascii=False) + "\n")

    def read_answers(self, paths: Iterable[Path], limits: dict[str, int]) -> tuple[Answers, list[str]]:
        """Return the good answers of some files, and a line for each of the others.

        Args:
            limits: Most tokens of each answer, by the ids that were asked for.

        Returns:
            An answer is good if its id was asked for and is answered once, and if its tokens are those that the model
            could have written: from the vocabulary, up to and with the first end token, or as many as were allowed.
        """
        answers: Answers = {}
        first_places: dict[str, str] = {}
        problems = []
        for place, line in _lines(paths):
            try:
                row = _json(line)
                name = row.get("id") if isinstance(row, dict) else None
                if not isinstance(name, str) or name not in limits:
                    raise ValueError(f"field 'id': expected the id of a prompt, got {name!r}")
                if name in first_places:
                    answers.pop(name, None)
                    raise ValueError(f"field 'id': {name!r} is answered twice, first at {first_places[name]}")
                first_places[name] = place
                answers[name] = self._answer(row, limits[name])
            except (ValueError, OverflowError) as error:
                problems.append(f"{place}: {error}")
        return answers, problems

    def _answer(self, row: dict[str, Any], limit: int) -> np.ndarray:
        """Return the tokens of an answer.

        Raises:
            ValueError: The model could not have written this answer.
        """
        ids = self._tokenized(row, limit) if "token_ids" not in row else _integers(row["token_ids"])
        if (unknown := ids[(ids < 0) | (ids >= self.vocabulary)]).size:
            raise ValueError(f"field 'token_ids': expected ids from 0 to {self.vocabulary - 1}, got {unknown[0]}")
        if len(ids) > limit:
            raise ValueError(f"expected at most {limit} tokens (max_new_tokens), got {len(ids)}")
        ends = np.flatnonzero(np.isin(ids, self.end_tokens))
        if ends.size and ends[0] < len(ids) - 1:
            raise ValueError(f"expected the end token {ids[ends[0]]} at the end alone, got tokens after it")
        if not ends.size and len(ids) < limit:
            raise ValueError(
                f"expected an end token ({', '.join(map(str, self.end_tokens))}) or {limit} tokens (max_new_tokens), "
                f"got {len(ids)} tokens without an end token"
            )
        return ids

    def _tokenized(self, row: dict[str, Any], limit: int) -> np.ndarray:
        """Return the tokens of an answer that is given as text, cut to `limit` tokens."""
        text, ended = row.get("text"), row.get("ended")
        if not isinstance(text, str) or not isinstance(ended, bool):
            raise ValueError("expected the field 'token_ids', or a text in 'text' and true or false in 'ended'")
        ids = tokenize_plain([text], self.tokenizer)[0]
        return np.array([*ids, *([self.closing_id] if ended else [])][:limit], np.int64)


def write_answers(path: Path, answers: Answers) -> None:
    """Write answers in the form in which they are read; a file of that name is replaced at once, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with naming(path), open(temporary, "w", encoding="utf-8") as file:
        for name, ids in answers.items():
            file.write(json.dumps({"id": name, "token_ids": ids.tolist()}) + "\n")
    temporary.replace(path)


def _lines(paths: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """Return the lines of the files that exist, each with its place."""
    for path in paths:
        if path.exists():
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    yield f"{path}, line {number}", line


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # bytes that are no UTF-8, too
        raise ValueError(f"expected a JSON object, got {line[:60]!r}") from error


def _integers(value: Any) -> np.ndarray:
    """Return a list of integers as an array.

    Raises:
        ValueError: The value is something else.
    """
    if not isinstance(value, list) or any(type(element) is not int for element in value):
        raise ValueError("field 'token_ids': expected a list of integers")
    return np.array(value, np.int64)
