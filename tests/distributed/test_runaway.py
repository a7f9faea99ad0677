"""A run whose contexts get worse with its loss: it says so, and stops or lowers p, also after a resume."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfgen_ds.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, Recipe, SelfgenConfig, TrainConfig
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


def write_copies(folder: Path, count: int) -> str:
    """Write rows that copy strings of varying length: after a wrong letter, the next one does not follow."""
    letters, path = random.Random(0), folder / f"copies-{count}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            text = "".join(letters.choices("abcdefghijklmnop", k=letters.randint(5, 9)))
            file.write(json.dumps({"prompt": f"{text}=", "completion": text}) + "\n")
    return str(path)


def copying(folder: Path, rows: int, selfgen: SelfgenConfig, model: str | None, steps: int) -> Recipe:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    preset = sizes | {"max_position_embeddings": 64}
    named = ModelConfig(preset=preset, tokenizer="byte", dtype="float32")
    return runs.recipe(
        folder,
        data=DataConfig(train=write_copies(folder, rows), max_length=64),
        model=named if model is None else ModelConfig(name_or_path=model, dtype="float32"),
        optim=OptimConfig(learning_rate=3e-3, schedule="cosine" if model is None else "constant"),
        selfgen=selfgen,
        train=TrainConfig(max_steps=steps, micro_batch_size=16),
    )


@pytest.mark.slow
def test_copying_on_own_tokens_runs_away_over_steps_and_over_rounds(two_ranks: Ranks, tmp_path: Path) -> None:
    """A model that has learned to copy is trained on contexts after which the target does not follow."""
    warm_up = copying(tmp_path, 3000, runs.SFT, None, 500)
    two_ranks.run(runs.run_training, warm_up, timeout=300)
    model = str(Path(warm_up.output_dir) / "model")
    own = SelfgenConfig(replace_probability=1.0, passes="exact", runaway="stop")

    over_steps = copying(tmp_path, 3000, own, model, 40)
    with pytest.raises(AssertionError, match="RuntimeError: the run runs away: "):
        two_ranks.run(runs.run_training, over_steps)
    first, *_, last = runs.metrics(over_steps)
    assert last["differing_share"] > 0.2 > first["differing_share"]
    assert last["loss"] > 10 * first["loss"]

    over_rounds = copying(tmp_path, 320, replace(own, method="bash"), model, 40)
    with pytest.raises(AssertionError, match="RuntimeError: round 2 is worse than the one before: "):
        two_ranks.run(runs.run_training, over_rounds)
    assert len(runs.metrics(over_rounds)) == 11, "the first step of the second round of ten steps"
    lowered = replace(over_rounds, output_dir=str(tmp_path / "lowered"))
    lowered.selfgen.runaway = "lower"
    lowered.train.max_steps = 25
    two_ranks.run(runs.run_training, lowered)
    values = [row["replace_probability"] for row in runs.metrics(lowered)]
    assert set(values[:20]) == {1.0}, "a round that is drawn stays as it is"
    assert set(values[20:]) == {0.5}
