"""The cache that outlasts a run: the folder `selfgen_ds/` in the cache of `datasets` (`HF_DATASETS_CACHE`)."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import datasets
from filelock import FileLock

from selfgen_ds.files import make_folder, write_atomically

_SETTLED = 3.0  # seconds; two writes that are closer together may get the same time from the file system


def cache_folder() -> Path:
    """Return the cache folder, and create it if it does not exist.

    Raises:
        InputError: The folder cannot be written to.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "selfgen_ds"
    make_folder(folder, "HF_DATASETS_CACHE")
    return folder


def content_hash(file: Path) -> str:
    """Return the SHA-256 of a file's content.

    One process reads the file, once. The cached hash is valid as long as the file's path, size, and modification time
    stay the same.

    Raises:
        OSError: The file cannot be read.
        InputError: The cache cannot be written to.
    """
    status = file.stat()
    name = hashlib.sha256(repr((str(file.resolve()), status.st_size, status.st_mtime_ns)).encode()).hexdigest()
    cached = cache_folder() / f"{name[:32]}.sha256"
    with FileLock(cached.with_suffix(".lock")):
        if cached.exists():
            return cached.read_text(encoding="ascii")
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if time.time() - status.st_mtime > _SETTLED:
            write_atomically(cached, digest)
        return digest
