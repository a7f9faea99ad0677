"""A user's own method: a class in the user's module, named in the recipe, without a change to the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.methods.method import Method, Policy, RoundMethod
from selfgen_ds.rounds.store import load_table
from tests.distributed import runs
from tests.ranks import Ranks


class LastToken(Method):
    """A method that replaces the last replaceable token by a probable token of the model, in every step."""

    settings: ClassVar[frozenset[str]] = frozenset({"temperature"})

    def contexts(self, batches: list[TokenBatch], policy: Policy, step: int) -> list[TokenBatch]:
        masks = []
        for batch in batches:
            allowed = batch.replaceable_mask
            last = (allowed * torch.arange(allowed.shape[1])).argmax(dim=1)
            masks.append(torch.zeros_like(allowed).scatter(1, last[:, None], True) & allowed)
        middle = [torch.full((int(mask.sum()),), 0.5, dtype=torch.float64) for mask in masks]
        drawn = policy.draw(batches, masks, middle)
        self.passes = 1
        return [
            replace(batch, context_ids=batch.context_ids.masked_scatter(mask, tokens), replaced_mask=mask)
            for batch, mask, tokens in zip(batches, masks, drawn, strict=True)
        ]


class OwnStart(RoundMethod):
    """A method that puts the model's answer before the prompt, where there is no loss, in rounds."""

    settings: ClassVar[frozenset[str]] = frozenset({"epochs_per_round", "max_new_tokens"})
    keeps_rows: ClassVar[bool] = False

    def rows(self, samples: list[TrainingRow], policy: Policy, number: int) -> tuple[list[TrainingRow], dict[str, int]]:
        answers = policy.complete([s.prompt_ids.tolist() for s in samples], self.config.max_new_tokens or 8)
        return [self._row(sample, answer) for sample, answer in zip(samples, answers, strict=True)], {}

    def _row(self, sample: TrainingRow, answer: list[int]) -> TrainingRow:
        ids = torch.tensor([*answer, *sample.target_ids]).numpy()
        places = torch.arange(len(ids)).numpy()
        return TrainingRow(
            sample_id=sample.sample_id,
            context_ids=ids,
            target_ids=ids,
            loss_mask=places >= len(answer) + len(sample.prompt_ids),
            replaceable_mask=np.zeros(len(ids), bool),
            replaced_mask=places < len(answer),
        )


def test_an_online_method_of_ones_own_is_trained(two_ranks: Ranks, tmp_path: Path) -> None:
    runs.write_rows(tmp_path)
    selfgen = SelfgenConfig(method="tests.distributed.test_user_method:LastToken", temperature=0.5)
    settings = runs.recipe(tmp_path, selfgen=selfgen)
    two_ranks.run(runs.run_training, settings, timeout=60)
    assert [row["passes"] for row in runs.metrics(settings)] == [1] * 4
    assert all(0 < row["drawn_tokens"] <= 8 for row in runs.metrics(settings))  # at most 8 rows per step


def test_a_method_of_ones_own_with_rounds_is_trained(two_ranks: Ranks, tmp_path: Path) -> None:
    runs.write_rows(tmp_path)
    selfgen = SelfgenConfig(method="tests.distributed.test_user_method:OwnStart", max_new_tokens=3)
    settings = runs.recipe(tmp_path, selfgen=selfgen)
    settings.train.max_steps = 6  # 5 steps per epoch
    two_ranks.run(runs.run_training, settings, timeout=60)
    for name in ("round-01", "round-02"):
        rows = load_table(Path(settings.output_dir) / "rollouts" / name)
        assert [int(row["sample_id"]) for row in rows] == list(range(40))
        assert all(1 <= row["replaced_mask"].sum() <= 3 and not row["loss_mask"][:3].any() for row in rows)
    losses = [row["loss"] for row in runs.metrics(settings)]
    assert losses[-1] < losses[0]
