"""A run whose contexts get worse with its loss: it says so, and stops or lowers p, also after a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfgen_ds.config import CheckpointConfig, Recipe, SelfgenConfig, TrainConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods.method import Policy
from selfgen_ds.methods.scheduled_sampling import ScheduledSampling
from tests.distributed import runs
from tests.ranks import Ranks

WORSE_FROM = 12


class Worse(ScheduledSampling):
    """Learns the reference in the first steps, and then targets that do not follow from the contexts."""

    def contexts(self, batches: list[TokenBatch], policy: Policy, step: int) -> list[TokenBatch]:
        if step < WORSE_FROM:
            return [replace(batch, replaced_mask=batch.replaceable_mask) for batch in batches]
        return [
            replace(
                batch,
                target_ids=torch.where(batch.replaceable_mask, (batch.target_ids * 7 + step) % 250, batch.target_ids),
                replaced_mask=batch.replaceable_mask,
            )
            for batch in batches
        ]


def recipe(folder: Path, runaway: str, steps: int = 26) -> Recipe:
    selfgen = SelfgenConfig(
        method="tests.distributed.test_runaway:Worse",
        replace_probability=0.8,
        runaway=runaway,  # type: ignore[arg-type]
    )
    train = TrainConfig(max_steps=steps, micro_batch_size=2)
    return runs.recipe(folder, selfgen=selfgen, train=train, checkpoint=CheckpointConfig(every=5, keep=9))


def test_a_run_that_runs_away_halves_p_where_the_recipe_says_so(two_ranks: Ranks, folder: Path) -> None:
    settings = recipe(folder, "lower")
    two_ranks.run(runs.run_training, settings)
    values = [row["replace_probability"] for row in runs.metrics(settings)]
    first = values.index(0.4)
    assert WORSE_FROM < first < WORSE_FROM + 12
    assert set(values[:first]) == {0.8}
    assert set(values[first:]) == {0.4}

    again = recipe(folder, "lower", first + 1)  # the resumed run has to find the lower p in the metrics
    again.output_dir = str(folder / "again")
    two_ranks.run(runs.run_training, again)
    again.resume, again.train.max_steps = "auto", 26
    two_ranks.run(runs.run_training, again)
    assert [row["replace_probability"] for row in runs.metrics(again)] == values


def test_a_run_that_runs_away_stops_after_a_save_where_the_recipe_says_so(two_ranks: Ranks, folder: Path) -> None:
    settings = recipe(folder, "stop")
    with pytest.raises(AssertionError, match=r"RuntimeError: the run runs away: .* of the drawn tokens differ"):
        two_ranks.run(runs.run_training, settings)
    steps = runs.metrics(settings)
    assert WORSE_FROM < len(steps) < 26
    assert (Path(settings.output_dir) / "checkpoints" / f"step-{len(steps):06}").exists()
