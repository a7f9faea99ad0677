"""The recipes and DeepSpeed JSONs that the package carries, found by name from any folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kind = Literal["recipes", "ds_configs"]

_SUFFIX: dict[Kind, str] = {"recipes": ".yaml", "ds_configs": ".json"}
_ROOT = Path(__file__).parent  # holds links to the repository's recipes/ and ds_configs/; a wheel holds their files


def find(name: str, kind: Kind) -> Path:
    """Return the file that a path or a name means.

    An existing file means itself. Otherwise `demo`, `demo.yaml` and `recipes/demo.yaml` mean the packaged recipe. The
    path of a file that does not exist, in any other folder, is returned as it is, for the reader to refuse.
    """
    path = Path(name)
    if path.is_file() or path.parent not in (Path(), Path(kind)):
        return path
    packaged = _ROOT / kind / (path.name.removesuffix(_SUFFIX[kind]) + _SUFFIX[kind])
    return packaged if packaged.is_file() else path


def names(kind: Kind) -> str:
    """Return the names of the packaged files, for help texts and messages."""
    return ", ".join(sorted(path.stem for path in (_ROOT / kind).glob("*" + _SUFFIX[kind])))
