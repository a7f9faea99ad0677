"""Check the weights of targets in the loss: `selfgen.drawn_context_weight` and `optim.loss: dft`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from selfgen_ds.config import DataConfig, ModelConfig, OptimConfig, Recipe, SelfgenConfig, TrainConfig
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.engine.step import train_step
from selfgen_ds.setup.prepare import prepare
from tests.batches import sample
from tests.distributed import runs
from tests.ranks import Ranks
from tests.tiers import matrix

SMOOTHING = 0.1
STEPS = 3


def settings(folder: Path, **changes: Any) -> Recipe:
    path = folder / "model"
    if not path.exists():
        runs.write_rows(folder)
        runs.write_model(folder, initializer_range=0.2)
    return runs.recipe(
        folder,
        **{
            "model": ModelConfig(name_or_path=str(path), dtype="float32"),
            "selfgen": SelfgenConfig(replace_probability=0.5, temperature=2.0),
            "optim": OptimConfig(
                learning_rate=1e-2,
                schedule="constant",
                warmup_ratio=0.0,
                max_grad_norm=0.0,
                label_smoothing=SMOOTHING,
            ),
            "train": TrainConfig(max_steps=STEPS, micro_batch_size=2, gradient_accumulation_steps=2),
        }
        | changes,
    )


def weighted_steps(recipe: Recipe, weight: float) -> dict[str, Any]:
    run = prepare(recipe, set())
    read, results = [], []
    for step in range(STEPS):
        batches = run.method.contexts(run.step_batches.at(step), run.policy, step)
        read.append(batches)
        dft = recipe.optim.loss == "dft" and step >= STEPS - max(1.0, recipe.optim.dft_share * STEPS)
        results.append(train_step(run.engine, batches, recipe.optim.label_smoothing, weight, dft=dft))
    parameters = {name: runs.whole(p) for name, p in run.engine.module.named_parameters()}
    return {"batches": read, "results": results, "parameters": parameters}


def plain_steps(
    path: Path, steps: list[list[TokenBatch]], weight: float, dft: bool = False
) -> tuple[list[float], dict[str, Any]]:
    """Run the same steps in float64 with full logits, target by target; return losses and parameters.

    Args:
        steps: The micro-batches of all ranks for each step.
        dft: Whether each loss, without label smoothing, is multiplied by the target's probability, a constant.
    """
    model = AutoModelForCausalLM.from_pretrained(path).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for batches in steps:
        total, weights = torch.zeros((), dtype=torch.float64), 0.0
        for batch in batches:
            for sample_id in batch.sample_ids[batch.sample_ids >= 0].unique().tolist():
                here = batch.sample_ids == sample_id
                context, target = batch.context_ids[here], batch.target_ids[here]
                drawn, loss_mask = batch.replaced_mask[here].tolist(), batch.loss_mask[here].tolist()
                logits = model(context[None]).logits[0]
                for t in range(1, len(target)):
                    if loss_mask[t]:
                        target_weight = weight if drawn[t - 1] else 1.0
                        loss = F.cross_entropy(logits[t - 1], target[t], label_smoothing=0.0 if dft else SMOOTHING)
                        loss = loss * (-loss).exp().detach() if dft else loss
                        total = total + target_weight * loss
                        weights += target_weight
        (total / weights).backward()
        losses.append(total.item() / weights)
        optimizer.step()
        optimizer.zero_grad()
    return losses, dict(model.named_parameters())


@matrix(
    ("packing", "weight", "dft"),
    [(False, 3.0, False), (True, 0.0, False), (False, 3.0, True)],
    ids=["padded", "packed", "dft"],
)
def test_the_step_is_the_weighted_mean_over_all_micro_batches_and_ranks(
    two_ranks: Ranks, one_rank: Ranks, tmp_path: Path, packing: bool, weight: float, dft: bool
) -> None:
    data = DataConfig(train=str(tmp_path / "rows.jsonl"), max_length=128, packing=packing)
    recipe = settings(tmp_path, data=data)
    if dft:
        recipe.optim = replace(recipe.optim, loss="dft", label_smoothing=0.0)
    ranks = two_ranks.run(weighted_steps, recipe, weight)
    steps = [[*one, *two] for one, two in zip(ranks[0]["batches"], ranks[1]["batches"], strict=True)]
    assert any(batch.replaced_mask.any() for batch in steps[0])
    losses, parameters = plain_steps(tmp_path / "model", steps, weight, dft)
    unweighted, _ = plain_steps(tmp_path / "model", steps[:1], 1.0)
    assert abs(losses[0] - unweighted[0]) > 1e-3, "the test could not see the weight"

    wide = replace(recipe.train, micro_batch_size=4)  # one rank reads the rows that two read
    alone = one_rank.run(weighted_steps, settings(tmp_path, data=data, train=wide, optim=recipe.optim), weight)[0]
    for run in (*ranks, alone):
        assert [result.loss for result in run["results"]] == pytest.approx(losses, rel=1e-5)
        for name, parameter in run["parameters"].items():
            assert torch.allclose(parameter.double(), parameters[name], rtol=1e-4, atol=2e-4), name


@pytest.mark.parametrize(
    "dft_share", [None, 1.0, 2 / 3, 0.01], ids=["cross_entropy", "dft", "dft in two of three", "dft in one at least"]
)
def test_a_run_trains_with_the_recipes_weights(two_ranks: Ranks, tmp_path: Path, dft_share: float | None) -> None:
    selfgen = SelfgenConfig(replace_probability=0.5, temperature=2.0, drawn_context_weight=3.0)
    (tmp_path / "start").mkdir()
    recipe = settings(tmp_path / "start", selfgen=selfgen, output_dir=str(tmp_path / "run"))
    if dft_share is not None:
        recipe.optim = replace(recipe.optim, loss="dft", dft_share=dft_share, label_smoothing=0.0)
    two_ranks.run(runs.run_training, recipe)
    steps = two_ranks.run(weighted_steps, replace(recipe, output_dir=str(tmp_path / "steps")), 3.0)
    assert [row["loss"] for row in runs.metrics(recipe)] == [result.loss for result in steps[0]["results"]]


def hand_made_steps(recipe: Recipe) -> list[Any]:
    """Run steps of three kinds: drawn tokens in the prompt (as in a correction), drawn tokens only, no tokens."""
    run = prepare(recipe, set())
    batch = collate([[sample([5, 6, 7, 8], [9, 10, 11])]])
    answer = torch.tensor([[False, True, True, False, False, False, False]])
    in_prompt = replace(batch, context_ids=batch.target_ids + answer, replaced_mask=answer)
    everywhere = replace(batch, replaced_mask=torch.ones_like(answer))
    nothing = collate([])
    results = []
    for batches in ([in_prompt, nothing], [everywhere, nothing], [nothing, nothing]):
        results.append(train_step(run.engine, batches, 0.0, 0.0))
    return results


def test_drawn_tokens_beside_the_targets_are_not_counted_and_weights_may_all_be_0(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    for in_prompt, everywhere, nothing in two_ranks.run(hand_made_steps, settings(tmp_path)):
        assert (in_prompt.drawn, in_prompt.differing) == (0, 0)
        assert in_prompt.loss > 0
        assert in_prompt.applied
        assert everywhere.drawn == 6  # three targets on each of two ranks
        assert [(result.loss, result.applied) for result in (everywhere, nothing)] == [(0.0, True)] * 2
