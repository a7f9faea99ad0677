"""A run that the `deepspeed` command starts as a user does, with secrets in its environment and an umask of 0."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.ranks import deepspeed

SECRETS = {"HF_TOKEN": "hf_3f9a1c", "WANDB_API_KEY": "wandb_77b2e0", "AWS_SECRET_ACCESS_KEY": "aws_5d11ce"}


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a run has left: its folder, and its output."""

    folder: Path
    output: str


def launch(folder: Path) -> Left:
    """Train `runs.YAML` on two ranks in a folder."""
    runs.write_rows(folder)
    (folder / "recipe.yaml").write_text(runs.YAML.format(folder=folder))
    umask = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in SECRETS.items():
                environment.setenv(name, value)
            with deepspeed(["train", "--config", str(folder / "recipe.yaml")], folder / "log") as run:
                assert run.wait() == 0, run.output()[-3000:]
    finally:
        os.umask(umask)
    return Left(folder=folder / "run", output=run.output())
