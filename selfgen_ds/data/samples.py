"""The tokenized data set: the rows of each source, tokenized once into a memory-mapped Arrow file.

The loss falls on the response: the completion and the end token, or the assistant's turns. A draw may replace all of
the response except for the tokens that close a turn and the last token, which the model never reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.chat.encoder import Encoded
from selfgen_ds.config import Sources, sources
from selfgen_ds.data.cache import cache_folder
from selfgen_ds.data.encoding import CHUNK_ROWS, Encoder, Format, chunks, in_form
from selfgen_ds.data.message_checks import KNOWN_FIELDS
from selfgen_ds.data.row import RowReader, TrainingRow
from selfgen_ds.data.row_checks import Columns, Refused, Row, TextPair
from selfgen_ds.data.rows import Opened, open_source
from selfgen_ds.data.tokenizer import tokenizer_hash
from selfgen_ds.errors import InputError
from selfgen_ds.files import naming, write_atomically
from selfgen_ds.progress import bar

log = logging.getLogger("selfgen_ds")

_IDS = datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features(
    {
        "sample_id": datasets.Value("int64"),
        "length": datasets.Value("int32"),
        "whole_length": datasets.Value("int32"),
        "input_ids": _IDS,
        "turns": _IDS,
    }
)
"""Columns of the table. `sample_id` counts the rows of this source alone. `whole_length` is the length before the
sample was cut. `turns` holds three numbers per response:
where the response starts, where its replaceable part ends, and where it ends. The lengths of all prompts and responses
can be computed from the turns without a look at the tokens."""


_MODULES = (
    *("chat/contents", "chat/conversation", "chat/encoder", "chat/template", "chat/turns"),
    *("data/encoding", "data/formats", "data/message_checks", "data/row_checks", "data/rows", "data/samples"),
)
"""The modules that make samples of rows."""
MOST_REASONS = 10
"""Refused rows of a source that an error lists."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A tokenized source. A row that was read is refused or becomes a sample, which may be truncated."""

    table: datasets.Dataset
    """One row per sample, with the columns above."""
    name: str
    read: int
    """Rows of the source that were read."""
    truncated: int
    """Samples whose response was cut at the longest length."""
    refused: int
    """Rows that cannot be used."""
    too_long: list[int]
    """Tokens of the refused rows whose prompt leaves no room for a response."""
    reasons: list[str]
    """Why the first refused rows cannot be used; each names the file, the row, and the field."""
    notes: list[str]
    """What else a user should know of the rows, such as fields that chat templates ignore."""
    closing_ids: list[int]
    """Special tokens that responses end with: the end token, or the tokens that a chat template closes turns with."""
    end_ids: tuple[int, ...] = ()
    """Tokens that the model's `generation_config.json` names as ends of an answer."""
    pairs: int
    """Rows of two texts."""
    conversations: int
    """Samples that are conversations, rows of two texts in the chat template included."""
    checksum: int
    """CRC-32 of all ids and turns: a resumed run must train on the same data."""
    folder: Path
    """Folder of the table in the cache."""
    first_id: int = 0
    """Sample id of the first row: the number of rows read from the sources before this one."""

    @cached_property
    def _reader(self) -> RowReader:
        return RowReader(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> TrainingRow:
        row = self._reader[index]
        sample_id, turns = self.first_id + int(row["sample_id"]), row["turns"].reshape(-1, 3)
        return TrainingRow.reference(sample_id, row["input_ids"], turns)

    def why_refused(self, remedy: str) -> list[str]:
        """Return lines that count the refused rows, say what to do, and list the first of them with their reasons."""
        count = f"{self.name}: {self.refused} of {self.read} rows cannot be used"
        if self.refused == 1:
            return [f"{count} ({self.reasons[0]}); {remedy}"]
        listed = "the first are" if self.refused > len(self.reasons) else "these are"
        return [f"{count}; {remedy}; {listed}", *self.reasons]

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Return the tokens of some samples: int64."""
        return self.table.select_columns("length")[indices]["length"]

    def part_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of every sample's `prompt_ids` and `response_ids`: `[samples]` int64 each."""
        prompts, responses = [], []
        for turns in self.table.data.column("turns").chunks:  # no row becomes a Python object: there may be millions
            ends = turns.offsets.to_numpy()[1:] - turns.offsets[0].as_py()
            flat = turns.flatten().to_numpy()
            prompts.append(flat[ends - 3])
            responses.append(flat[ends - 1] - flat[ends - 3])
        return np.concatenate(prompts).astype(np.int64), np.concatenate(responses).astype(np.int64)


def load(given: Sources, split: str, tokenizer: PreTrainedTokenizerBase, form: Format) -> list[Samples]:
    """Return the samples of every source, with the cache of `load_samples`.

    Args:
        split: `train` or `test`, for sources that name no split.

    Raises:
        InputError: A source cannot be found or read.
    """
    loaded = []
    all_sources = sources(given)
    limit = None if form.limit is None else -(-form.limit // len(all_sources))
    for source in all_sources:
        columns = Columns(
            prompt=source.prompt_column or form.columns.prompt,
            completion=source.completion_column or form.columns.completion,
            messages=source.messages_column or form.columns.messages,
        )
        source_form = replace(form, columns=columns, limit=limit)
        loaded.append(load_samples(open_source(source, split, columns), tokenizer, source_form))
    return with_consecutive_ids(loaded)


def with_consecutive_ids(samples: Sequence[Samples]) -> list[Samples]:
    """Return the sources with sample ids that continue from one source to the next."""
    first_ids = accumulate((source.read for source in samples), initial=0)
    return [replace(source, first_id=first) for source, first in zip(samples, first_ids, strict=False)]


def load_samples(source: Opened, tokenizer: PreTrainedTokenizerBase, form: Format) -> Samples:
    """Return the samples of a source from the cache, or tokenize the source into it.

    The cache is `selfgen_ds/` in the folder where `datasets` keeps its own (`HF_DATASETS_CACHE`). Of the processes that
    want the same samples, on all hosts that share the folder, one process tokenizes and the others wait.

    Raises:
        InputError: A row is not as expected, or none is usable.
    """
    folder = cache_folder() / _fingerprint(source, tokenizer, form)
    failure = folder.with_suffix(".error")
    since = time.time()
    with FileLock(folder.with_suffix(".lock")):
        if failure.exists() and failure.stat().st_mtime >= since:
            raise InputError(failure.read_text(encoding="utf-8"))  # the process that held the lock met a bad row
        if not (folder / "info.json").exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                with naming(partial):
                    _write(source, tokenizer, form, partial)
            except InputError as error:
                shutil.rmtree(partial)
                write_atomically(failure, str(error))
                raise
            failure.unlink(missing_ok=True)
            partial.rename(folder)
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    table = datasets.Dataset.from_file(str(folder / "samples.arrow")).with_format("numpy")
    samples = Samples(table=table, name=source.name, folder=folder, end_ids=form.end_ids, **info)
    for note in samples.notes:
        log.warning("%s", note)
    if form.as_chat is None and tokenizer.chat_template and samples.conversations < len(samples):
        log.warning(
            "%s: rows of two texts are read without the tokenizer's chat template; as_chat: true puts them into it, "
            "and as_chat: false leaves this line out",
            source.name,
        )
    return samples


def first_rows(samples: list[Samples], limit: int | None = None) -> list[TrainingRow]:
    """Return the first samples of all sources together, in memory; all of them without a limit."""
    return [source[i] for source in samples for i in range(len(source))][:limit]


def end_tokens(samples: list[Samples], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer of a model that learned these samples."""
    learned = (token for source in samples for token in (*source.closing_ids, *source.end_ids))
    return sorted({tokenizer.eos_token_id, *learned})


def _fingerprint(source: Opened, tokenizer: PreTrainedTokenizerBase, form: Format) -> str:
    digest = hashlib.sha256(repr((source.fingerprint, form, tokenizer_hash(tokenizer))).encode())
    # Other code may make other samples of the same rows.
    for name in _MODULES:
        digest.update((Path(__file__).parent.parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:32]


def _write(source: Opened, tokenizer: PreTrainedTokenizerBase, form: Format, folder: Path) -> None:
    """Write `samples.arrow` and then `info.json`, whose presence says that the table is complete."""
    encoder = Encoder(tokenizer, form)
    tally = _Tally(tokenizer, form.max_length)
    unknown: dict[str, str] = {}
    with (
        ArrowWriter(features=_FEATURES, path=str(folder / "samples.arrow"), writer_batch_size=CHUNK_ROWS) as writer,
        bar(f"tokenize {source.name}", "row", delay=2) as progress,
    ):
        for chunk in chunks(in_form(row, form) for row in tally.count_pairs(islice(source.rows, form.limit))):
            columns: dict[str, list] = {name: [] for name in _FEATURES}
            unknown = _unknown_fields(chunk) | unknown
            for row, encoded in zip(chunk, encoder.encode(chunk), strict=True):
                for name, value in tally.sample(row, encoded).items():
                    columns[name].append(value)
            if columns["length"]:
                writer.write_batch(columns)
            progress.update(len(chunk))
    with open(folder / "samples.arrow", "rb") as file:
        os.fsync(file.fileno())
    if tally.read == tally.refused:
        of_one = f": {tally.reasons[0]}" if len(tally.reasons) == 1 else ""
        room = "; a larger data.max_length leaves room for responses" if tally.too_long else ""
        first_line = f"{source.name}: no usable row among {tally.read}{of_one}{room}"
        raise InputError("\n".join([first_line, *([] if of_one else tally.reasons)]))
    notes = [
        f"{where}: most chat templates ignore a field {name!r} of a message; other rows may have it too"
        for name, where in unknown.items()
    ]
    if form.prompt_template != Format.prompt_template and not tally.pairs:
        notes.append(f"{source.name}: no row has two texts; data.prompt_template has no effect on it")
    if encoder.unlike_inference:
        notes.append(
            f"{source.name}: in {len(encoder.unlike_inference)} of {tally.read} rows the chat template shows a turn "
            f"otherwise than when the model generates it ({encoder.unlike_inference[0]})"
        )
    if encoder.asked_with:
        variables = json.dumps(encoder.asked_with[0])
        notes.append(
            f"{source.name}: in {len(encoder.asked_with)} of {tally.read} rows the answer follows the generation "
            f"prompt that the chat template writes with {variables}: ask the model so (generate "
            "--chat_template_kwargs)"
        )
    counts = {name: value for name, value in vars(tally).items() if not name.startswith("_")}
    counts |= {"closing_ids": sorted(tally.closing_ids), "notes": notes}
    write_atomically(folder / "info.json", json.dumps(counts))


def _unknown_fields(rows: list[Row]) -> dict[str, str]:
    """Return the fields of messages that no usual chat template reads, each with the first row that has it."""
    return {
        name: row.where
        for row in reversed(rows)
        if isinstance(row, Conversation)
        for message in row.messages
        for name in message.keys() - KNOWN_FIELDS
    }


class _Tally:
    """Cuts rows to the longest length, and counts them. The public attributes become fields of `Samples`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._max_length = max_length
        self.read = self.truncated = self.refused = self.pairs = self.conversations = self.checksum = 0
        self.too_long: list[int] = []
        self.reasons: list[str] = []
        self.closing_ids: set[int] = set()

    def count_pairs(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass rows on, and count those of two texts."""
        for row in rows:
            self.pairs += isinstance(row, TextPair)
            yield row

    def sample(self, row: Row, encoded: Encoded | Refused) -> dict[str, Any]:
        """Return the columns of the sample that a row becomes; nothing if the row is refused."""
        number, longest = self.read, self._max_length
        self.read += 1
        if isinstance(encoded, Refused):
            return self._refuse(encoded.reason)
        all_ids, all_turns = encoded
        ids = all_ids[:longest]
        turns = [
            [start, min(replaceable, len(ids) - 1), min(end, longest)]
            for start, replaceable, end in all_turns
            if 0 < start < min(end, longest)  # nothing predicts a first token
        ]
        if not turns:
            self.too_long.append(len(all_ids))
            where, prompt = getattr(row, "where", "") or f"row {number + 1}", all_turns[0][0]
            return self._refuse(
                f"{where}: the prompt leaves no room for a response within {longest} tokens; it has {prompt} itself"
            )
        self.conversations += isinstance(row, Conversation)
        self.truncated += all_turns[-1][2] > longest
        for _, content_end, end in all_turns:
            self.closing_ids |= set([token for token in all_ids[content_end:end] if token in self._special][-1:])
        flat = [position for turn in turns for position in turn]
        self.checksum = zlib.crc32(np.array([*ids, *flat], dtype=np.int32).tobytes(), self.checksum)
        lengths = {"length": len(ids), "whole_length": len(all_ids)}
        return {"sample_id": number, **lengths, "input_ids": ids, "turns": flat}

    def _refuse(self, reason: str) -> dict[str, Any]:
        self.refused += 1
        if len(self.reasons) < MOST_REASONS:
            self.reasons.append(reason)
        return {}
