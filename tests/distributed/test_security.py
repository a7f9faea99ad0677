"""The files and logs of a run hold no secret of its environment, and nobody else can write to the files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.distributed.test_command import RECIPE, train
from tests.ranks import deepspeed

pytestmark = pytest.mark.slow
SECRETS = {"HF_TOKEN": "hf_3f9a1c", "WANDB_API_KEY": "wandb_77b2e0", "AWS_SECRET_ACCESS_KEY": "aws_5d11ce"}


@dataclass(frozen=True, kw_only=True)
class Left:
    """The folder and the output of a run with secrets in its environment and an umask of 0."""

    folder: Path
    output: str


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("left")
    runs.write_rows(folder)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    umask = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in SECRETS.items():
                environment.setenv(name, value)
            with deepspeed(train(folder), folder / "log") as run:
                assert run.wait() == 0, run.output()[-3000:]
    finally:
        os.umask(umask)
    return Left(folder=folder / "run", output=run.output())


def test_no_secret_is_in_a_log_or_file(left: Left) -> None:
    files = [path for path in left.folder.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    for name, value in SECRETS.items():
        assert value not in left.output, name
        assert not [path for path in files if value.encode() in path.read_bytes()], name


def test_nothing_is_writable_for_everybody(left: Left) -> None:
    writable = [path for path in [left.folder, *left.folder.rglob("*")] if path.stat().st_mode & 0o002]
    assert not writable
