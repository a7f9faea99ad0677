"""Weights & Biases, without a network: what a run leaves for `wandb sync`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import runs
from tests.forked import command


@pytest.mark.test
@pytest.mark.timeout(200)
def test_a_run_s_metrics_are_in_weights_and_biases_under_its_name(tmp_path: Path) -> None:
    runs.write_rows(tmp_path)
    (tmp_path / "recipe.yaml").write_text(runs.YAML.format(folder=tmp_path))
    arguments = ["train", "--config", str(tmp_path / "recipe.yaml"), "--wandb_project", "mine", "--run_name", "first"]
    code = command(arguments, tmp_path / "log", {"WANDB_MODE": "offline"})
    assert code == 0, (tmp_path / "log").read_text()[-3000:]
    [file] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    written = file.read_bytes()  # protobuf, which holds texts as they are; all values are JSON
    losses = [str(loss) for loss in runs.losses(tmp_path / "run")]
    assert [text for text in ("mine", "first", "train/loss", *losses) if text.encode() not in written] == []
