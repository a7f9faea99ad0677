"""Rows -> samples of token ids, tokenised once into memory-mapped Arrow files.

A pair of texts becomes `prompt ids + completion ids + end token`. Prompt and completion are tokenised apart, so that
the boundary is a token boundary; the prompt gets the tokenizer's own begin token where it has one. Special tokens
that a text happens to spell stay text. A conversation becomes what the chat template makes of it
(`selfgen_ds.data.chat`). The loss falls on the response: completion and end token, or the assistant's turns. All of it
may be replaced but for what closes a turn, and the last token, which nothing ever reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import cast

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from selfgen_ds.config import Sources, sources
from selfgen_ds.data.cache import cache_folder
from selfgen_ds.data.chat import ChatEncoder, Conversation
from selfgen_ds.data.rows import Columns, Opened, open_source
from selfgen_ds.data.tasks import Row
from selfgen_ds.data.tokenizer import tokenizer_hash
from selfgen_ds.errors import InputError
from selfgen_ds.files import write_atomically

log = logging.getLogger("selfgen_ds")

_CHUNK, _CHARACTERS = 1000, 1_000_000  # rows tokenised at once: at most so many, and about so much text
_IDS = datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features(
    {
        "sample_id": datasets.Value("int64"),
        "length": datasets.Value("int32"),
        "input_ids": _IDS,
        "turns": _IDS,
        "forced_ids": _IDS,
        "rest_ids": _IDS,
    }
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row as tokens."""

    sample_id: int
    """The row's number in its source, from 0, behind those of the sources before it."""
    input_ids: np.ndarray
    """`[length]` int64."""
    turns: np.ndarray
    """`[turns, 3]` int64: where a response starts, where what may be replaced of it ends, where it ends."""
    forced_ids: np.ndarray | None = None
    """Built-in tasks: the start of a response up to and with one wrong token."""
    rest_ids: np.ndarray | None = None
    """Built-in tasks: what is right after `forced_ids`."""
    context_ids: np.ndarray | None = None
    """Rounds: what the model reads in the place of `input_ids`; `[length]` int64."""
    drawn: np.ndarray | None = None
    """Rounds: where that is what the model drew; `[length]` bool."""

    @property
    def prompt_ids(self) -> np.ndarray:
        """What stands before the last response."""
        return self.input_ids[: self.turns[-1, 0]]

    @property
    def response_ids(self) -> np.ndarray:
        """The last response."""
        return self.input_ids[self.turns[-1, 0] : self.turns[-1, 2]]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A tokenised source. Of the rows read, `len` are used (the truncated among them) and the others refused."""

    table: datasets.Dataset
    """A row a sample: the fields of `Sample` (`turns` flat) and `length`."""
    name: str
    read: int
    truncated: int
    refused: int
    first_refused: str
    """The row, by file and line."""
    closing_ids: list[int]
    """Special tokens that responses end with: the end token, or what a chat template closes a turn with."""
    conversations: int
    """Rows of `len` that are conversations; the others are pairs of texts."""
    checksum: int
    """CRC-32 of all ids and turns, to know the same data again."""
    folder: Path
    """Where it is cached."""
    first_id: int = 0
    """Rows of the sources before it."""

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        row = self.table[index]
        return Sample(
            sample_id=self.first_id + int(row["sample_id"]),
            input_ids=row["input_ids"],
            turns=row["turns"].reshape(-1, 3),
            forced_ids=row["forced_ids"],
            rest_ids=row["rest_ids"],
        )

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of some samples: int64."""
        return self.table.select_columns("length")[indices]["length"]

    def part_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of every sample's `prompt_ids` and `response_ids`: `[samples]` int64 each."""
        prompts, responses = [], []
        for turns in self.table.data.column("turns").chunks:
            behind = turns.offsets.to_numpy()[1:] - turns.offsets[0].as_py()
            flat = turns.flatten().to_numpy()
            prompts.append(flat[behind - 3])
            responses.append(flat[behind - 1] - flat[behind - 3])
        return np.concatenate(prompts).astype(np.int64), np.concatenate(responses).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Format:
    """What tokenising depends on beside the rows and the tokenizer."""

    columns: Columns = field(default_factory=Columns)
    assistant_turns: str = "all"
    max_length: int
    limit: int | None = None
    """Rows read, the first ones, an equal part of every source; none means all."""


def load(given: Sources, split: str, tokenizer: PreTrainedTokenizerBase, form: Format) -> list[Samples]:
    """The samples of every source (`load_samples`).

    Args:
        split: `train` or `test`, for sources that name none.

    Raises:
        InputError: A source cannot be found or read.
    """
    loaded = []
    found = sources(given)
    limit = None if form.limit is None else -(-form.limit // len(found))
    for source in found:
        columns = Columns(
            prompt=source.prompt_column or form.columns.prompt,
            completion=source.completion_column or form.columns.completion,
            messages=source.messages_column or form.columns.messages,
        )
        its_form = replace(form, columns=columns, limit=limit)
        loaded.append(load_samples(open_source(source, split, columns), tokenizer, its_form))
    return numbered(loaded)


def numbered(samples: Sequence[Samples]) -> list[Samples]:
    """Several sources, whose samples get ids that go on from one to the next."""
    first_ids = accumulate((source.read for source in samples), initial=0)
    return [replace(source, first_id=first) for source, first in zip(samples, first_ids, strict=False)]


def load_samples(source: Opened, tokenizer: PreTrainedTokenizerBase, form: Format) -> Samples:
    """The samples of a source, from the cache, or tokenised into it.

    The cache is `selfgen_ds/` in the folder where `datasets` keeps its own (`HF_DATASETS_CACHE`). Of the processes that
    want the same samples one tokenises and the others wait, on as many hosts as share the folder.

    Raises:
        InputError: A row is not as expected, or none is usable.
    """
    folder = cache_folder() / _fingerprint(source, tokenizer, form)
    failure = folder.with_suffix(".error")
    since = time.time()
    with FileLock(folder.with_suffix(".lock")):
        if failure.exists() and failure.stat().st_mtime >= since:
            raise InputError(failure.read_text(encoding="utf-8"))  # what the process that was first has met
        if not (folder / "info.json").exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                _write(source, tokenizer, form, partial)
            except InputError as error:
                shutil.rmtree(partial)
                write_atomically(failure, str(error))
                raise
            failure.unlink(missing_ok=True)
            partial.rename(folder)
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    table = datasets.Dataset.from_file(str(folder / "samples.arrow")).with_format("numpy")
    return Samples(table=table, name=source.name, folder=folder, **info)


def take(samples: list[Samples], limit: int | None = None) -> list[Sample]:
    """Samples in memory: at most `limit`."""
    return [source[i] for source in samples for i in range(len(source))][:limit]


def end_tokens(samples: list[Samples], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that an answer to such samples ends with."""
    return sorted({tokenizer.eos_token_id, *(token for source in samples for token in source.closing_ids)})


def _fingerprint(source: Opened, tokenizer: PreTrainedTokenizerBase, form: Format) -> str:
    digest = hashlib.sha256(repr((source.fingerprint, form, tokenizer_hash(tokenizer))).encode())
    # other code would make other samples of the same rows
    for name in ("chat", "formats", "rows", "samples", "tasks", "validation"):
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:32]


def _write(source: Opened, tokenizer: PreTrainedTokenizerBase, form: Format, folder: Path) -> None:
    """`samples.arrow` and, as the last thing, `info.json`."""
    longest = form.max_length
    crc = used = truncated = refused = read = conversations = 0
    first_refused = ""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    closing: set[int] = set()
    rows = islice(source.rows, form.limit)
    encoder = _Encoder(tokenizer, form.assistant_turns)
    with (
        ArrowWriter(features=_FEATURES, path=str(folder / "samples.arrow"), writer_batch_size=_CHUNK) as writer,
        tqdm(desc=f"tokenise {source.name}", unit="row", delay=2, leave=False) as bar,
    ):
        for chunk in _chunks(rows):
            columns: dict[str, list] = {name: [] for name in _FEATURES}
            for number, (row, encoded) in enumerate(zip(chunk, encoder.encode(chunk), strict=True), start=read):
                ids = encoded.ids[:longest]
                turns = [
                    [start, min(replaceable, len(ids) - 1), min(end, longest)]
                    for start, replaceable, end in encoded.turns
                    if 0 < start < min(end, longest)  # nothing predicts a first token
                ]
                if not turns:
                    refused += 1
                    first_refused = first_refused or row.where or f"row {number + 1}"
                    continue
                conversations += isinstance(row, Conversation)
                truncated += encoded.turns[-1][2] > longest
                _, content_end, end = encoded.turns[-1]
                closing |= set([token for token in encoded.ids[content_end:end] if token in special][-1:])
                flat = [position for turn in turns for position in turn]
                values = (number, len(ids), ids, flat, encoded.forced, encoded.rest)
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
                crc = zlib.crc32(np.array([*ids, *flat], dtype=np.int32).tobytes(), crc)
            if columns["length"]:
                writer.write_batch(columns)
            used += len(columns["length"])
            read += len(chunk)
            bar.update(len(chunk))
    with open(folder / "samples.arrow", "rb") as file:
        os.fsync(file.fileno())
    if not used:
        refusal = f": {first_refused} leaves no room for a response within {longest} tokens" if refused else ""
        raise InputError(f"{source.name}: no usable row among {read}{refusal}")
    if not closing:
        log.warning("%s: no special token closes a response: the model cannot learn to stop", source.name)
    info = {
        "read": read,
        "truncated": truncated,
        "refused": refused,
        "first_refused": first_refused,
        "closing_ids": sorted(closing),
        "conversations": conversations,
        "checksum": crc,
    }
    write_atomically(folder / "info.json", json.dumps(info))


def _chunks(rows: Iterator[Row | Conversation]) -> Iterator[list[Row | Conversation]]:
    chunk: list[Row | Conversation] = []
    size = 0
    for row in rows:
        chunk.append(row)
        if isinstance(row, Conversation):
            size += sum(len(message.get("content") or "") for message in row.messages)
        else:
            size += len(row.prompt) + len(row.completion)
        if len(chunk) == _CHUNK or size > _CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    ids: list[int]
    turns: list[list[int]]
    forced: list[int] | None = None
    rest: list[int] | None = None


class _Encoder:
    """Rows of either kind -> token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_turns: str) -> None:
        self._tokenizer = tokenizer
        self._assistant_turns = assistant_turns
        self._chat: ChatEncoder | None = None

    def encode(self, rows: list[Row | Conversation]) -> Iterator[_Encoded]:
        for _, run in groupby(rows, key=type):
            some = list(run)
            if isinstance(some[0], Conversation):
                self._chat = self._chat or ChatEncoder(self._tokenizer, self._assistant_turns)
                for ids, turns in self._chat.encode(cast("list[Conversation]", some)):
                    yield _Encoded(ids=ids, turns=turns)
            else:
                yield from self._pairs(cast("list[Row]", some))

    def _pairs(self, rows: list[Row]) -> Iterator[_Encoded]:
        end = self._tokenizer.eos_token_id
        prompts = self._tokenizer([row.prompt for row in rows], split_special_tokens=True)["input_ids"]
        completions = self._plain([row.completion for row in rows])
        with_error = rows[0].forced is not None
        forced = self._plain([row.forced or "" for row in rows]) if with_error else []
        rest = self._plain([row.rest or "" for row in rows]) if with_error else []
        for i in range(len(rows)):
            prompt = prompts[i]
            if prompt and prompt[-1] == end:
                prompt = prompt[:-1]  # some tokenizers close every text
            ids = [*prompt, *completions[i], end]
            yield _Encoded(
                ids=ids,
                turns=[[len(prompt), len(ids) - 1, len(ids)]],
                forced=forced[i] if with_error else None,
                rest=[*rest[i], end] if with_error else None,
            )

    def _plain(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
