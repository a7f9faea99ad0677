"""Ranks with very different data make the same collective calls, so that nothing hangs."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from selfgen_ds import hashing
from selfgen_ds.config import DataConfig, Recipe, SelfgenConfig, TrainConfig
from selfgen_ds.engine.step import train_step
from selfgen_ds.methods.mixture import mix, replacement_mask
from selfgen_ds.model.budget import SweepBudget
from selfgen_ds.setup.prepare import prepare
from tests.batches import padded
from tests.distributed import runs
from tests.ranks import Ranks

_TIMEOUT = 60.0
REPLACE, DRAW = (hashing.REPLACE, 0, 0), (hashing.DRAW, 0, 0)


def uneven_draws(settings: Recipe) -> tuple[list[int], int]:
    """Draw nothing on rank 0 and rows of very different lengths on rank 1, then nothing on either."""
    run = prepare(settings, set())
    lengths = [1, 1] if dist.get_rank() == 0 else [1, 100]
    batches = [padded([[65, 66]], [[67] * length], [i]) for i, length in enumerate(lengths)]
    masks = [replacement_mask(batch, 1.0, REPLACE) for batch in batches]
    drawn = [int(mask.sum()) for mask in masks]
    mixed, made = mix(batches, run.policy, masks, 2, DRAW)
    assert made == 2
    groups = run.policy.groups
    train_step(run.engine, mixed, 0.0)
    nothing = [torch.zeros_like(mask) for mask in masks]
    assert mix(batches, run.policy, nothing, 2, DRAW)[1] == 0
    assert [m.context_ids.shape for m in mixed] == [b.context_ids.shape for b in batches]
    return drawn, groups


def test_a_rank_that_draws_nothing_keeps_step_with_one_that_draws_much(two_ranks: Ranks, folder: Path) -> None:
    drawn = two_ranks.run(uneven_draws, runs.recipe(folder), timeout=_TIMEOUT)
    assert drawn[0][0] == [0, 0]
    assert drawn[1][0] == [0, 99]
    assert drawn[0][1] == drawn[1][1] > 0


def test_ranks_may_need_different_numbers_of_sweeps(two_ranks: Ranks, folder: Path) -> None:
    counts = two_ranks.run(sweeps, runs.recipe(folder), timeout=_TIMEOUT)
    assert counts[0] == counts[1] > 1


def sweeps(settings: Recipe) -> int:
    """Draw in one sweep on rank 0 and in several on rank 1, whose micro-batches do not fit into one."""
    run = prepare(settings, set())
    run.policy.budget = SweepBudget(forward=1, training=1, prefetched=0)
    count = 1 if dist.get_rank() == 0 else 4
    batches = [padded([[65]], [[67] * 20], [i]) for i in range(count)]
    masks = [replacement_mask(batch, 1.0, REPLACE) for batch in batches]
    whole, _ = mix(batches, run.policy, masks, 1, DRAW)
    groups = run.policy.groups
    run.policy.budget = None
    for one, other in zip(whole, mix(batches, run.policy, masks, 1, DRAW)[0], strict=True):
        assert torch.equal(one.context_ids, other.context_ids)
    return groups


def test_an_evaluation_with_fewer_rows_than_ranks_ends(two_ranks: Ranks, folder: Path) -> None:
    runs_of_one = folder / "one.jsonl"
    runs_of_one.write_text('{"prompt": "a", "completion": "b"}\n')
    one_step = TrainConfig(max_steps=1, micro_batch_size=1)
    settings = runs.recipe(folder, train=one_step, selfgen=SelfgenConfig(method="sft"))
    settings.data = DataConfig(train=settings.data.train, eval=str(runs_of_one), max_length=128)
    two_ranks.run(runs.run_training, settings, timeout=_TIMEOUT)
    assert runs.metrics(settings)[-1]["eval_loss"] > 0
