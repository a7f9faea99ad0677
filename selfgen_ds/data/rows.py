"""Sources of data: files, folders, hub data sets, and built-in tasks are all opened here, as validated rows of text."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi

from selfgen_ds.config import Source
from selfgen_ds.data import tasks
from selfgen_ds.data.cache import cache_folder, content_hash
from selfgen_ds.data.formats import READERS, RawRow, first_line, read_file, suffix
from selfgen_ds.data.hub import use_cache_without_network
from selfgen_ds.data.row_checks import Columns, Row, TextPair, validated
from selfgen_ds.errors import InputError
from selfgen_ds.files import refusal

_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source of rows that exists."""

    name: str
    fingerprint: list[str]
    """Strings that change whenever the rows do."""
    rows: Iterable[Row]
    """The rows, which are read while they are iterated over."""


def open_source(source: Source, split: str, columns: Columns) -> Opened:
    """Find a source of rows.

    Args:
        split: `train` or `test`, the split to read from a task, a folder, or a hub data set if the source names none.

    Raises:
        InputError: The source does not exist or cannot be read; iterating over the rows raises it too.
    """
    path = Path(source.path)
    if (task := tasks.task_of(source.path)) is not None:
        split = tasks.split_of(source.path, split)
        fingerprint = [source.path, split, inspect.getsource(tasks)]
        pairs = (TextPair(prompt=prompt, completion=completion) for prompt, completion in tasks.generate(task, split))
        return Opened(name=source.path, fingerprint=fingerprint, rows=pairs)
    if path.is_file():
        return _open_files(source.path, [path], columns)
    if path.is_dir():
        return _open_files(source.path, _folder_files(path, source, split), columns)
    return _open_hub(source, split, columns)


def raw_files(source: Source, split: str) -> Iterator[tuple[str, Iterator[RawRow]]]:
    """Yield the name of every file of a source and its rows as they are, with all of their fields.

    A data set of the hub and a built-in task are one file.

    Args:
        split: As for `open_source`.

    Raises:
        InputError: The source does not exist or cannot be read.
    """
    path = Path(source.path)
    if (task := tasks.task_of(source.path)) is not None:
        pairs = tasks.generate(task, tasks.split_of(source.path, split))
        rows = ({"prompt": prompt, "completion": completion} for prompt, completion in pairs)
        yield source.path, ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    elif path.exists():
        for file in _known([path] if path.is_file() else _folder_files(path, source, split)):
            yield str(file), read_file(file)
    else:
        yield source.path, _read_hub(source.path, _load_hub(source, split)[1])


def _open_files(name: str, files: list[Path], columns: Columns) -> Opened:
    fingerprint = []
    for file in _known(files):
        try:
            fingerprint.append(content_hash(file))
        except OSError as error:
            raise InputError(refusal(error) or f"{file}: {error}") from error

    def rows() -> Iterator[Row]:
        for file in files:
            empty = True
            for row in validated(str(file), read_file(file), columns):
                empty = False
                yield row
            if empty:
                raise InputError(f"{file}: expected rows, got none")

    return Opened(name=name, fingerprint=fingerprint, rows=rows())


def _known(files: list[Path]) -> list[Path]:
    """Return files whose formats are all known.

    Raises:
        InputError: One is of another format.
    """
    if unknown := [file for file in files if suffix(file) not in READERS]:
        raise InputError(f"{unknown[0]}: expected a file that ends in {', '.join(READERS)}")
    return files


def _folder_files(folder: Path, source: Source, split: str) -> list[Path]:
    """Find the files of a split as `datasets` does: by names such as `train-00000.parquet`, or by the README's list."""
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _saved_files(folder, source, split)
    cache_folder()  # `datasets` needs the folder too; if it cannot be written to, this error names it, not the data
    try:
        data_files = datasets.load_dataset_builder(str(folder), source.subset).config.data_files
    except (OSError, ValueError, DatasetsError) as error:
        expected = f"expected a folder with files that end in {', '.join(READERS)}"
        raise InputError(f"{folder}: {expected}: {' '.join(str(error).split())}") from error
    by_split = {str(name): [Path(file) for file in files] for name, files in data_files.items()}
    files = by_split[_choose_split(str(folder), source, split, list(by_split))]
    if not _declares_files(folder):  # `datasets` reads the most common format and ignores the others silently
        used = {file.resolve() for files in by_split.values() for file in files}
        unused = [f for f in sorted(folder.rglob("*")) if _holds_rows(f, folder) and f.resolve() not in used]
        if unused:
            raise InputError(f"{folder}: {unused[0].name} would be left out beside {files[0].name}: name the files")
    return files


def _declares_files(folder: Path) -> bool:
    """Return whether a README names the files of each split, as on the hub: other files are then unused on purpose."""
    card = folder / "README.md"
    return card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace")


def _holds_rows(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    return suffix(file) in READERS and file.name not in _NOT_DATA and not hidden


def _saved_files(folder: Path, source: Source, split: str) -> list[Path]:
    """Find the files of a data set that `datasets` saved with `save_to_disk`."""
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # the type depends on which file is damaged, and how
        raise InputError(f"{folder}: expected a complete saved data set: {first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        saved = saved[_choose_split(str(folder), source, split, list(saved))]
    return [Path(file["filename"]) for file in saved.cache_files]


def _choose_split(name: str, source: Source, split: str, available: list[str]) -> str:
    wanted = source.split or split
    if wanted in available:
        return wanted
    if source.split is None and len(available) == 1:
        return available[0]
    raise InputError(f"{name}: expected a split of {', '.join(available)}, got {wanted!r}")


def _open_hub(source: Source, split: str, columns: Columns) -> Opened:
    name = ", ".join(filter(None, (source.path, source.subset, source.split)))
    chosen, rows, fingerprint = _load_hub(source, split)
    validated_rows = validated(name, _read_hub(name, rows), columns)
    return Opened(name=name, fingerprint=[name, chosen, fingerprint], rows=validated_rows)


def _load_hub(source: Source, split: str) -> tuple[str, Iterable[dict[str, Any]], str]:
    """Return the chosen split of a hub data set, its rows, and a string that changes whenever they do.

    Raises:
        InputError: It cannot be loaded.
    """
    use_cache_without_network()
    try:
        splits = datasets.get_dataset_split_names(source.path, source.subset)
        chosen = _choose_split(source.path, source, split, splits)
        rows = datasets.load_dataset(source.path, source.subset, split=chosen, streaming=source.streaming)
        fingerprint = str(HfApi().dataset_info(source.path).sha) if source.streaming else rows._fingerprint
    except InputError:
        raise
    except Exception as error:  # the type depends on the cause: no network, no such id, no such subset, no access
        expected = "expected a file, a folder or a data set on the hub"
        raise InputError(f"{source.path}: {expected}: {first_line(error)}") from error
    return chosen, rows, fingerprint


def _read_hub(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[RawRow]:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row
    except Exception as error:  # the type depends on the cause: a broken connection, a damaged file
        raise InputError(f"{name}: cannot be read after row {number}: {first_line(error)}") from error
