"""One door for data: files, folders, hub data sets and built-in tasks, as validated rows of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi

from selfgen_ds.config import Source
from selfgen_ds.data.cache import cache_folder, content_hash
from selfgen_ds.data.chat import SURROGATE, Conversation
from selfgen_ds.data.formats import READERS, Raw, read_file
from selfgen_ds.data.hub import use_cache_without_network
from selfgen_ds.data.tasks import TASKS, Row, generate
from selfgen_ds.errors import InputError

_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The fields of a row that are read."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source that was found."""

    name: str
    fingerprint: list[str]
    """Changes whenever the rows do."""
    rows: Iterable[Row | Conversation]


def open_source(source: Source, split: str, columns: Columns) -> Opened:
    """Find a source; its rows are read when they are iterated over.

    Args:
        split: `train` or `test`: what a task, a folder or a hub data set gives if the source names no split.

    Raises:
        InputError: There is no such source, or none that can be read; when iterated: a row that is not as expected,
            by file, row and field.
    """
    path = Path(source.path)
    if source.path.startswith("builtin:"):
        task = source.path.removeprefix("builtin:")
        if task not in TASKS:
            raise InputError(f"{source.path}: unknown task; known are {', '.join(sorted(TASKS))}")
        return Opened(name=source.path, fingerprint=[source.path, split], rows=generate(task, split))
    if path.is_file():
        return _open_files(source.path, [path], columns)
    if path.is_dir():
        return _open_files(source.path, _folder_files(path, source, split), columns)
    return _open_hub(source, split, columns)


def _open_files(name: str, files: list[Path], columns: Columns) -> Opened:
    if unknown := [file for file in files if file.suffix.lower() not in READERS]:
        raise InputError(f"{unknown[0]}: expected a file that ends in {', '.join(READERS)}")
    fingerprint = []
    for file in files:
        try:
            fingerprint.append(content_hash(file))
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error

    def rows() -> Iterator[Row | Conversation]:
        for file in files:
            empty = True
            for row in _validated(str(file), read_file(file), columns):
                empty = False
                yield row
            if empty:
                raise InputError(f"{file}: no rows")

    return Opened(name=name, fingerprint=fingerprint, rows=rows())


def _folder_files(folder: Path, source: Source, split: str) -> list[Path]:
    """The files of a split, as `datasets` finds them: by names such as `train-00000.parquet`, or the README's list."""
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _saved_files(folder, source, split)
    cache_folder()  # `datasets` needs it too, and would blame the data
    try:
        found = datasets.load_dataset_builder(str(folder), source.subset).config.data_files
    except (OSError, ValueError, DatasetsError) as error:
        expected = f"expected a folder with files that end in {', '.join(READERS)}"
        raise InputError(f"{folder}: {expected}: {' '.join(str(error).split())}") from error
    by_split = {str(name): [Path(file) for file in files] for name, files in found.items()}
    files = by_split[_split(str(folder), source, split, list(by_split))]
    if not _declares_files(folder):  # `datasets` takes the commonest format and leaves the rest without a word
        used = {file.resolve() for files in by_split.values() for file in files}
        left = [f for f in sorted(folder.rglob("*")) if _holds_rows(f, folder) and f.resolve() not in used]
        if left:
            raise InputError(f"{folder}: {left[0].name} would be left out beside {files[0].name}: name the files")
    return files


def _declares_files(folder: Path) -> bool:
    """Whether a README names the files of each split, as on the hub: others are left out on purpose then."""
    card = folder / "README.md"
    return card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace")


def _holds_rows(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    return file.suffix.lower() in READERS and file.name not in _NO_DATA and not hidden


def _saved_files(folder: Path, source: Source, split: str) -> list[Path]:
    """The files of what `datasets` saved with `save_to_disk`."""
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # the types differ by which of its files is damaged, and how
        raise InputError(f"{folder}: not a whole saved data set: {_first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        saved = saved[_split(str(folder), source, split, list(saved))]
    return [Path(file["filename"]) for file in saved.cache_files]


def _split(name: str, source: Source, split: str, there: list[str]) -> str:
    wanted = source.split or split
    if wanted in there:
        return wanted
    if source.split is None and len(there) == 1:
        return there[0]
    raise InputError(f"{name}: no split {wanted!r}; it has {', '.join(there)}")


def _open_hub(source: Source, split: str, columns: Columns) -> Opened:
    use_cache_without_network()
    name = ", ".join(filter(None, (source.path, source.subset, source.split)))
    try:
        splits = datasets.get_dataset_split_names(source.path, source.subset)
        chosen = _split(source.path, source, split, splits)
        if source.streaming:
            rows = datasets.load_dataset(source.path, source.subset, split=chosen, streaming=True)
            fingerprint = str(HfApi().dataset_info(source.path).sha)
        else:
            rows = datasets.load_dataset(source.path, source.subset, split=chosen)
            fingerprint = rows._fingerprint
    except InputError:
        raise
    except Exception as error:  # the types differ by what is wrong: no network, no such id, no such subset, no access
        raise InputError(
            f"{source.path}: neither a file or folder here nor a data set that the hub gave: {_first_line(error)}"
        ) from error
    return Opened(
        name=name, fingerprint=[name, chosen, fingerprint], rows=_validated(name, _read_hub(name, rows), columns)
    )


def _read_hub(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Raw]:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row
    except Exception as error:  # a connection that breaks, a file that is damaged: the types differ
        raise InputError(f"{name}: cannot be read behind row {number}: {_first_line(error)}") from error


def _validated(name: str, raw: Iterable[Raw], columns: Columns) -> Iterator[Row | Conversation]:
    """Rows of one file. The first one tells whether they are pairs of texts or conversations."""
    pairs: bool | None = None
    for number, fields in raw:
        where = f"{name}, {number}"
        if pairs is None:
            pairs = columns.messages not in fields or (columns.prompt in fields and columns.completion in fields)
        if pairs:
            yield _pair(fields, where, columns)
        else:
            messages = _field(fields, columns.messages, where)
            messages = _messages(messages, f"{where}, field {columns.messages!r}")
            yield _conversation(messages, fields, where)


def _pair(fields: dict[str, Any], where: str, columns: Columns) -> Row | Conversation:
    prompt, completion = (_field(fields, column, where) for column in (columns.prompt, columns.completion))
    if _has_roles(prompt) and _has_roles(completion):
        both = f"{where}, fields {columns.prompt!r} and {columns.completion!r}"
        messages = _messages(prompt + completion, both)
        return _conversation(messages, fields, where, given=len(prompt))
    if _has_roles(prompt) != _has_roles(completion):
        both = f"fields {columns.prompt!r} and {columns.completion!r}"
        raise InputError(f"{where}, {both}: expected two texts or two lists of messages, got one of each")
    for column, text in ((columns.prompt, prompt), (columns.completion, completion)):
        _check_text(text, f"{where}, field {column!r}")
    return Row(prompt=prompt, completion=completion, where=where)


def _check_text(text: Any, where: str, may_be_empty: bool = False) -> None:
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a string, got {type(text).__name__}")
    if not text and not may_be_empty:
        raise InputError(f"{where}: expected text, got an empty string")
    if not text.isascii() and SURROGATE.search(text):
        raise InputError(f"{where}: expected UTF-8 text, got half a surrogate pair or a stray byte")


def _has_roles(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(m, dict) and "role" in m for m in value)


# role -> the roles that it may follow; None is the start
_FOLLOWS: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "developer": (None,),
    "user": (None, "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A conversation in TRL's form: roles in turn, the assistant's last."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: expected a list of messages, got {'none' if value == [] else type(value).__name__}")
    messages = []
    before: str | None = None
    for number, fields in enumerate(value, start=1):
        at = f"{where}, message {number}"
        if not isinstance(fields, dict):
            raise InputError(f"{at}: expected an object with role and content, got {type(fields).__name__}")
        message = {name: item for name, item in fields.items() if item is not None}  # Arrow fills what a row lacks
        role = message.get("role")
        if not isinstance(role, str) or role not in _FOLLOWS:
            raise InputError(f"{at}: expected a role of {', '.join(_FOLLOWS)}, got {role!r}")
        if before not in _FOLLOWS[role]:
            raise InputError(f"{at}: roles out of order: {role!r} {f'after {before!r}' if before else 'comes first'}")
        calls = role == "assistant" and message.get("tool_calls")
        if not calls or "content" in message:
            _check_text(message.get("content"), f"{at}, content", may_be_empty=bool(calls) or role != "assistant")
        messages.append(message)
        before = role
    if before != "assistant":
        raise InputError(f"{where}: the assistant's turn is missing: the last message is of {before!r}")
    return messages


def _conversation(messages: list[dict[str, Any]], fields: dict[str, Any], where: str, given: int = 0) -> Conversation:
    """With what else a row may have for its template, as in TRL."""
    settings = fields.get("chat_template_kwargs") or {}
    if not isinstance(settings, dict):
        raise InputError(f"{where}, field 'chat_template_kwargs': expected an object, got {type(settings).__name__}")
    settings = {name: value for name, value in settings.items() if value is not None}  # Arrow fills what a row lacks
    tools = _tools(fields, where)
    return Conversation(messages=messages, given=given, tools=tools, template_kwargs=settings, where=where)


def _tools(fields: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """Schemas of the tools that a conversation may call: a list, or its JSON."""
    tools = fields.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}, field 'tools': malformed JSON: {error}") from error
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"{where}, field 'tools': expected a list of objects, got {type(tools).__name__}")
    return tools or None


def _field(fields: dict[str, Any], column: str, where: str) -> Any:
    if column not in fields:
        raise InputError(f"{where}: field {column!r} is missing; the row has {', '.join(map(repr, fields))}")
    return fields[column]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
