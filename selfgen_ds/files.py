"""Files and folders on disk: atomic and durable writes, checksums, locks, and what the operating system refuses."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from selfgen_ds.errors import InputError

log = logging.getLogger("selfgen_ds")

_ADVICE = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or ask for a larger quota",
    errno.EACCES: "give this user the right to read and write there",
    errno.EPERM: "give this user the right to read and write there",
    errno.EROFS: "choose another folder, or have it mounted for writing",
    errno.EIO: "look at the disk, or at the file server",
    errno.EMFILE: "raise the number of files that a process may open (`ulimit -n`)",
    errno.ENFILE: "raise the number of files that this host may open (`sysctl fs.file-max`)",
}
_NO_FILE = (ConnectionError, TimeoutError, ChildProcessError, ProcessLookupError, socket.gaierror)
_NUMBER = re.compile(r"\(os error (\d+)\)")  # in the errors of libraries that are written in Rust


def refusal(error: BaseException) -> str | None:
    """Return a line about the file that the operating system has refused, and what to do.

    Returns:
        The line, or None if something else has caused the error.
    """
    cause = _system_error(error)
    if cause is None:
        return None
    if cause.errno is None:  # a library's own words
        return " ".join(str(cause).split())
    path = "" if cause.filename is None else f"{os.fsdecode(cause.filename)}: "
    advice = f"; {_ADVICE[cause.errno]}" if cause.errno in _ADVICE else ""
    return f"{path}{cause.strerror}{advice}"


def _system_error(error: BaseException | None) -> OSError | None:
    """Return the operating system's error that has caused an error; None if there is none about a file."""
    while error is not None:
        if isinstance(error, OSError) and (error.filename is not None or not isinstance(error, _NO_FILE)):
            return error
        if number := _NUMBER.search(str(error)):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__
    return None


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Let the operating system's errors name the file or folder that the block works on, or what else it writes.

    They name a file that cannot be opened, but not one that cannot be written to the end.

    Raises:
        OSError: An error of the block was one of the operating system's, and named no file.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause = _system_error(error)
        if cause is None or cause.errno is None or cause.filename is not None:
            raise
        raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error


def make_folder(path: Path, setting: str) -> None:
    """Create an output folder if it does not exist, and check that this process can write to it.

    Args:
        setting: The name of the setting that chose the folder, for the error.

    Raises:
        InputError: The folder cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{setting}: {path} cannot be written to: {error.strerror}") from error


def absolute_folder(name: str) -> str:
    """Return the absolute path of a folder, or the name unchanged if it is a hub id."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def lock(folder: Path, setting: str) -> IO[str]:
    """Lock a folder against other runs until the returned file is closed or this process ends.

    Args:
        setting: The name of the setting that chose the folder, for the error.

    Raises:
        InputError: Another process holds the lock.
    """
    file = open(folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InputError(f"{setting}: another run is writing to {folder}") from error
    except OSError:
        log.warning("%s is on a file system without locks: make sure that no second run writes to it", folder)
    return file


def as_json(value: Any) -> str:
    """Return a value as JSON, indented. A number that is not finite, which JSON does not have, becomes null."""
    return json.dumps(_finite(value), indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, finds the old content or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path), open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_and_sum(path: Path) -> list[int]:
    """Flush a file to the disk and return its size in bytes and its CRC-32.

    The file then leaves the page cache, so that the next reader gets the bytes that are on the disk.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        entry = [path.stat().st_size, _crc(path)]
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return entry


def intact(path: Path, entry: list[int]) -> bool:
    """Return whether a file still has the size and CRC-32 that `sync_and_sum` returned."""
    return path.is_file() and path.stat().st_size == entry[0] and _crc(path) == entry[1]


def damaged(folder: Path, files: dict[str, list[int]]) -> list[str]:
    """Return the files of a folder that are missing, cannot be read, or are not as they were written.

    Args:
        files: Name of a file -> what `sync_and_sum` returned for it.

    Returns:
        Their names; if the operating system has refused a file, with its reason.
    """
    try:
        os.listdir(folder)  # DeepSpeed finds its files so
    except OSError as error:
        return [f"{name}: {error.strerror}" for name in files]
    found = []
    for name, entry in files.items():
        try:
            if not intact(folder / name, entry):
                found.append(name)
        except OSError as error:
            found.append(f"{name}: {error.strerror}")
    return found


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def sync_folder(path: Path) -> None:
    """Flush a folder to the disk, so that new names in it survive the loss of the node."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
