"""Versions of Python and of the packages that must be the same on every host of a run."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path


def versions() -> dict[str, str]:
    """Return name -> version.

    The version of this package is a hash of its source, because an edit changes no version number.
    """
    source = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        source.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode() + file.read_bytes())
    return {"python": platform.python_version()} | libraries() | {"selfgen_ds source": source.hexdigest()[:16]}


def libraries() -> dict[str, str]:
    """Return name -> version of the libraries that compute."""
    return {name: version(name) for name in ("torch", "deepspeed", "transformers")}
