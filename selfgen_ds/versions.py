"""What runs here: the versions that every host of a run has to have in common.

`python -m selfgen_ds.versions` prints them, a line each.
"""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("torch", "deepspeed", "transformers")


def versions() -> dict[str, str]:
    """Name -> version; of this package a hash of its source, which an editable installation does not number."""
    source = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        source.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode() + file.read_bytes())
    found = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    return found | {"selfgen_ds source": source.hexdigest()[:16]}


if __name__ == "__main__":
    print(*(f"{name} {value}" for name, value in versions().items()), sep="\n")
