"""The files and logs of a run hold no secret of its environment, and nobody else can write to the files."""

from __future__ import annotations

import pytest

from tests.distributed.launched import SECRETS, Left

pytestmark = pytest.mark.slow


def test_no_secret_is_in_a_log_or_file(launched: Left) -> None:
    files = [path for path in launched.folder.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    for name, value in SECRETS.items():
        assert value not in launched.output, name
        assert not [path for path in files if value.encode() in path.read_bytes()], name


def test_nothing_is_writable_for_everybody(launched: Left) -> None:
    writable = [path for path in [launched.folder, *launched.folder.rglob("*")] if path.stat().st_mode & 0o002]
    assert not writable
