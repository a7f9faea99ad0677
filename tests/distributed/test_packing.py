"""Packed rows: the model reads, draws and learns each sample as if the sample had a row of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from selfgen_ds.config import DataConfig, ModelConfig, OptimConfig, Recipe, SelfgenConfig, TrainConfig
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.samples import first_rows
from selfgen_ds.engine.step import train_step
from selfgen_ds.setup.prepare import Run, prepare
from tests.distributed import runs
from tests.ranks import Ranks
from tests.tiers import matrix

TIMEOUT = 60.0


def settings(folder: Path, **changes: Any) -> Recipe:
    runs.write_rows(folder)
    return runs.recipe(
        folder,
        **{
            "data": DataConfig(train=str(folder / "rows.jsonl"), max_length=128, packing=True),
            "train": TrainConfig(max_steps=2, micro_batch_size=2, gradient_accumulation_steps=2),
            "optim": OptimConfig(learning_rate=1e-2, warmup_ratio=0.0, max_grad_norm=0.0),
            "selfgen": SelfgenConfig(replace_probability=0.5, temperature=2.0, passes=2),
        }
        | changes,
    )


def apart(run: Run, batches: list[TokenBatch]) -> list[TokenBatch]:
    """Return the samples of packed micro-batches, one sample per row."""
    samples = {sample.sample_id: sample for sample in first_rows(run.samples)}
    ids = [batch.sample_ids[batch.sample_ids >= 0].unique().tolist() for batch in batches]
    return [collate([[samples[sample]] for sample in some]) for some in ids]


def by_sample(batches: list[TokenBatch]) -> dict[int, list[int]]:
    ids = {int(sample) for batch in batches for sample in batch.sample_ids[batch.sample_ids >= 0].unique()}
    return {i: [t for batch in batches for t in batch.context_ids[batch.sample_ids == i].tolist()] for i in sorted(ids)}


def predictions(run: Run, batches: list[TokenBatch]) -> dict[int, list[float]]:
    by_owner: dict[int, list[float]] = {}
    for batch in batches:
        owners = batch.sample_ids[batch.loss_mask].tolist()
        for owner, value in zip(owners, run.policy.predict(batch).log_probability.tolist(), strict=True):
            by_owner.setdefault(owner, []).append(value)
    return by_owner


def step_packed_or_apart(recipe: Recipe, packed: bool) -> dict[str, Any]:
    run = prepare(recipe, set())
    batches = run.step_batches.at(0)
    samples_per_row = [len(batch.sample_ids[row].unique()) for batch in batches for row in range(len(batch.sample_ids))]
    if not packed:
        batches = apart(run, batches)
    likelihoods = predictions(run, batches)
    batches = run.method.contexts(batches, run.policy, 0)
    result = train_step(run.engine, batches, recipe.optim.label_smoothing)
    parameters = {name: runs.whole(p) for name, p in run.engine.module.named_parameters()}
    return {
        "samples per row": max(samples_per_row),
        "contexts": by_sample(batches),
        "likelihoods": likelihoods,
        "loss": result.loss,
        "differing": result.differing,
        "norm": result.grad_norm,
        "parameters": parameters,
    }


@matrix("attention", ["sdpa", "eager"])
def test_packed_rows_are_read_drawn_and_learned_like_samples_apart(
    two_ranks: Ranks, tmp_path: Path, attention: Literal["sdpa", "eager"]
) -> None:
    recipe = settings(tmp_path)
    recipe.model = replace(recipe.model, attn_implementation=attention)
    packed = two_ranks.run(step_packed_or_apart, recipe, True, timeout=TIMEOUT)
    other = replace(recipe, output_dir=recipe.output_dir + "-apart")
    alone = two_ranks.run(step_packed_or_apart, other, False, timeout=TIMEOUT)
    for one, two in zip(packed, alone, strict=True):
        assert one["samples per row"] > 1
        assert one["differing"] > 0
        assert one["contexts"] == two["contexts"]
        assert one["likelihoods"].keys() == two["likelihoods"].keys()
        for sample, values in one["likelihoods"].items():
            assert values == pytest.approx(two["likelihoods"][sample], abs=1e-5)
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["norm"] == pytest.approx(two["norm"], rel=1e-4)
        for name, parameter in one["parameters"].items():
            assert torch.allclose(parameter, two["parameters"][name], atol=1e-4), name


def refused(recipe: Recipe) -> str:
    try:
        prepare(recipe, set())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_a_model_that_lets_packed_samples_see_each_other_is_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    opt = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ModelConfig(preset=opt | {"word_embed_proj_dim": 32}, tokenizer="byte", dtype="float32")
    for message in two_ranks.run(refused, settings(tmp_path, model=model), timeout=TIMEOUT):
        assert message.startswith("InputError: data.packing")
        assert "opt" in message
