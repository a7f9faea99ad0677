"""Files and folders on disk: atomic and durable writes, checksums, locks."""

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


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, finds the old content or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
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
