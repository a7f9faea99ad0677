"""The Python of docs/library.md runs as it is written, and the public names are those of the package's `__init__`."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import selfgen_ds
from tests.distributed import runs
from tests.ranks import ENVIRONMENT, ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_run_from_the_top(tmp_path: Path) -> None:
    Path(runs.write_model(tmp_path)).rename(tmp_path / "my-model")
    runs.write_rows(tmp_path)
    for block in BLOCKS:
        if module := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / module[1]).write_text(block)
    program = "\n".join(block for block in BLOCKS if not block.startswith("# "))
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^step (\d): loss \d", done.stdout, re.MULTILINE) == ["0", "1", "2"]
    assert "free-running accuracy" in done.stdout
    assert len((tmp_path / "runs" / "noise" / "metrics.jsonl").read_text().splitlines()) == 2


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
