"""The Python of docs/library.md runs as it is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.ranks import ENVIRONMENT, ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
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
