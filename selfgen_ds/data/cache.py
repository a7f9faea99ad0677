"""What is kept between runs: `selfgen_ds/` in the folder where `datasets` keeps its own (`HF_DATASETS_CACHE`)."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import datasets
from filelock import FileLock

from selfgen_ds.files import make_folder, write_atomically

_SETTLED = 3.0  # seconds; in less a file system may give two contents the same time


def cache_folder() -> Path:
    """The folder, made if it is not there.

    Raises:
        InputError: It cannot be written to.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "selfgen_ds"
    make_folder(folder, "HF_DATASETS_CACHE")
    return folder


def content_hash(file: Path) -> str:
    """SHA-256 of a file's content, read by one process and once, as long as path, size and time stay the same.

    Raises:
        OSError: It cannot be read.
        InputError: The cache cannot be written to.
    """
    status = file.stat()
    name = hashlib.sha256(repr((str(file.resolve()), status.st_size, status.st_mtime_ns)).encode()).hexdigest()
    known = cache_folder() / f"{name[:32]}.sha256"
    with FileLock(known.with_suffix(".lock")):
        if known.exists():
            return known.read_text(encoding="ascii")
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if time.time() - status.st_mtime > _SETTLED:
            write_atomically(known, digest)
        return digest
