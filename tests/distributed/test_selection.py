"""A run trains on the rows of a round that the method selects."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch.distributed as dist

from selfgen_ds.config import DataConfig, Recipe, SelfgenConfig, Source, TrainConfig
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.methods.bash import Bash
from selfgen_ds.methods.method import Policy
from selfgen_ds.setup.prepare import prepare
from tests.distributed import runs
from tests.ranks import Ranks


class Half(Bash):
    """A method that trains on the even samples in the first round, and on the odd samples in the next."""

    keeps_rows: ClassVar[bool] = False

    def select(self, sample_ids: np.ndarray, equal: np.ndarray, number: int) -> np.ndarray:
        return np.flatnonzero(sample_ids % 2 == number % 2)


class Nobody(Bash):
    """A method that selects no row of the second of two sources."""

    keeps_rows: ClassVar[bool] = False

    def select(self, sample_ids: np.ndarray, equal: np.ndarray, number: int) -> np.ndarray:
        return np.flatnonzero(sample_ids < 40)


class Lossy(Bash):
    """A method that loses a row that one rank draws."""

    def rows(self, samples: list[TrainingRow], policy: Policy, number: int) -> tuple[list[TrainingRow], dict[str, int]]:
        rows, counts = super().rows(samples, policy, number)
        return rows[1:] if dist.get_rank() else rows, counts


def read_in_steps(settings: Recipe, steps: list[int]) -> list[list[int]]:
    """Return the sample ids that this rank reads in some steps; the run is not trained."""
    run = prepare(settings, set())
    assert run.rounds is not None
    by_step = [run.rounds.step_batches(step).at(step) for step in steps]
    return [[i for batch in batches for i in batch.sample_ids[:, 0].tolist() if i >= 0] for batches in by_step]


def test_a_method_s_selected_rows_are_trained_on_equally_often(two_ranks: Ranks, folder: Path) -> None:
    settings = runs.recipe(
        folder,
        selfgen=SelfgenConfig(method="tests.distributed.test_selection:Half"),
        data=DataConfig(train=str(folder / "rows.jsonl"), max_length=128),
        train=TrainConfig(max_steps=10, micro_batch_size=2, gradient_accumulation_steps=2),
    )
    by_rank = two_ranks.run(read_in_steps, settings, list(range(10)))
    steps = [sorted(first + second) for first, second in zip(*by_rank, strict=True)]
    for number in range(2):  # 5 steps of 8 rows, 20 samples
        read = Counter(i for ids in steps[5 * number : 5 * number + 5] for i in ids)
        assert read == dict.fromkeys(range(number, 40, 2), 2)
    settings.output_dir += "-later"
    shutil.copytree(Path(settings.output_dir.removesuffix("-later")) / "rollouts", f"{settings.output_dir}/rollouts")
    assert two_ranks.run(read_in_steps, settings, [7, 8, 3]) == [[ids[i] for i in (7, 8, 3)] for ids in by_rank]


def test_a_source_without_selected_rows_keeps_all_its_rows(two_ranks: Ranks, folder: Path) -> None:
    more = [{"prompt": f"other {i}: ", "completion": "row"} for i in range(3)]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    sources = [Source(path=str(folder / f), weight=w) for f, w in (("rows.jsonl", 1.0), ("more.jsonl", 0.1))]
    settings = runs.recipe(
        folder,
        selfgen=SelfgenConfig(method="tests.distributed.test_selection:Nobody"),
        data=DataConfig(train=[*sources], max_length=128),
        train=TrainConfig(max_steps=12, micro_batch_size=2, gradient_accumulation_steps=2),
    )
    by_rank = two_ranks.run(read_in_steps, settings, list(range(12)))
    read = Counter(i for ids in by_rank for step in ids for i in step)
    assert {40, 41, 42} <= read.keys()
    assert sum(read[i] for i in (40, 41, 42)) < 20


def test_rows_that_do_not_fit_the_samples_end_all_ranks(two_ranks: Ranks, folder: Path) -> None:
    settings = runs.recipe(folder, selfgen=SelfgenConfig(method="tests.distributed.test_selection:Lossy"))
    with pytest.raises(AssertionError, match=r"(?s)rank 0.*(fit the samples: rank 1: expected one row).*rank 1.*\1"):
        two_ranks.run(runs.run_training, settings)
