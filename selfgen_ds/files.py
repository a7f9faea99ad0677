"""Files that must be whole or not there."""

from __future__ import annotations

import fcntl
import logging
import os
import zlib
from pathlib import Path
from typing import IO

from selfgen_ds.errors import InputError

log = logging.getLogger("selfgen_ds")


def make_folder(path: Path, setting: str) -> None:
    """Create an output folder, or find it there.

    Raises:
        InputError: It cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{setting}: {path} cannot be written to: {error.strerror}") from error


def absolute_folder(name: str) -> str:
    """The absolute path of a model's folder; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def lock(folder: Path, setting: str) -> IO[str]:
    """Keep other processes from writing to a folder, until the returned file is closed or this process ends.

    Raises:
        InputError: Another process holds it.
    """
    file = open(folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InputError(f"{setting}: another run is writing to {folder}") from error
    except OSError:
        log.warning("%s is on a file system without locks: nothing keeps a second run from writing to it", folder)
    return file


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_and_sum(path: Path) -> list[int]:
    """Bring a file to the disk; its bytes and CRC-32. Whoever reads it next reads it from there, not from memory."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        found = [path.stat().st_size, _crc(path)]
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return found


def intact(path: Path, entry: list[int]) -> bool:
    """Whether a file has the bytes and CRC-32 that it was written with."""
    return path.is_file() and path.stat().st_size == entry[0] and _crc(path) == entry[1]


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def sync_folder(path: Path) -> None:
    """New names in a folder outlast a lost node."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
