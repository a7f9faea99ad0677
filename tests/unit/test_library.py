"""The public names are those of the package's `__init__` and of docs/library.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import selfgen_ds
from tests.ranks import ROOT


def test_every_public_name_is_there_and_is_typed() -> None:
    assert all(getattr(selfgen_ds, name).__name__ == name for name in selfgen_ds.__all__)
    nodes = ast.walk(ast.parse(Path(selfgen_ds.__file__).read_text(encoding="utf-8")))
    typed = {alias.asname for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(selfgen_ds.__all__) <= typed


def test_every_public_name_is_in_the_page() -> None:
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    assert [name for name in selfgen_ds.__all__ if not re.search(rf"\b{name}\b", page)] == []


def test_importing_the_package_does_not_import_torch() -> None:
    program = "import selfgen_ds, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
