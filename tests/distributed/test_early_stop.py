"""A run that no longer gets better ends with its best checkpoint, and TensorBoard shows every step once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from selfgen_ds.checkpoint import manifest
from selfgen_ds.checkpoint.export import export_checkpoint
from selfgen_ds.config import CheckpointConfig, DataConfig, EvalConfig, OptimConfig, Recipe, TrainConfig
from tests.distributed import runs
from tests.ranks import Ranks


def _recipe(folder: Path, learning_rate: float = 1e-2, steps: int = 9) -> Recipe:
    runs.write_rows(folder)
    return runs.recipe(
        folder,
        data=DataConfig(train=str(folder / "rows.jsonl"), eval=str(folder / "rows.jsonl"), max_length=128),
        optim=OptimConfig(learning_rate=learning_rate, warmup_ratio=0.0, schedule="constant"),
        train=TrainConfig(max_steps=steps, micro_batch_size=2),
        checkpoint=CheckpointConfig(every=100, keep=1),
        eval=EvalConfig(every=1, max_samples=4, sample_temperatures=[1.5]),
    )


@pytest.mark.test
@pytest.mark.timeout(300)
def test_a_run_that_no_longer_gets_better_ends_and_exports_its_best_checkpoint(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    settings = _recipe(tmp_path, learning_rate=3.0)  # every step makes the model worse, but for the first ones
    settings.eval.patience = 2
    two_ranks.run(runs.run_training, settings)
    losses = [row["eval_loss"] for row in runs.metrics(settings)]
    assert all("eval_sampled_1.5_accuracy" in row for row in runs.metrics(settings))
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 9
    checkpoints = Path(settings.output_dir) / "checkpoints"
    found = manifest.best_of(manifest.complete_checkpoints(checkpoints), "loss")
    assert found is not None
    assert found.step == best + 1
    export_checkpoint(found.path, tmp_path / "best")
    exported, expected = (
        load_file(folder / "model.safetensors") for folder in (Path(settings.output_dir) / "model", tmp_path / "best")
    )
    assert all(exported[name].equal(expected[name]) for name in expected)

    shutil.rmtree(Path(settings.output_dir) / "model")
    settings.resume = "auto"
    two_ranks.run(runs.run_training, settings)
    assert len(runs.metrics(settings)) == len(losses), "a resumed run has ended too"
    assert load_file(Path(settings.output_dir) / "model" / "model.safetensors").keys() == expected.keys()


@pytest.mark.test
@pytest.mark.timeout(300)
def test_tensorboard_has_groups_and_every_step_of_a_resumed_run_once(two_ranks: Ranks, tmp_path: Path) -> None:
    settings = _recipe(tmp_path, steps=4)
    settings.checkpoint.every, settings.checkpoint.keep = 1, 9
    two_ranks.run(runs.run_training, settings)
    for step in (3, 4):
        shutil.rmtree(manifest.path_of(Path(settings.output_dir) / "checkpoints", step))
    settings.resume = "auto"
    two_ranks.run(runs.run_training, settings)
    board = EventAccumulator(str(Path(settings.output_dir) / "tensorboard"))
    board.Reload()
    tags = board.Tags()["scalars"]
    assert {tag.split("/")[0] for tag in tags} == {"train", "eval", "speed", "selfgen"}
    assert {"train/loss", "eval/loss", "speed/tokens_per_second", "selfgen/differing_share"} <= set(tags)
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]
    answers = [tag for tag in board.Tags()["tensors"] if tag.startswith("eval/answer to row")]
    assert len(answers) == 2
