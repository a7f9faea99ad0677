"""A sharded model draws exact contexts, whatever rows the ranks hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from selfgen_ds import hashing
from selfgen_ds.config import DataConfig, ModelConfig, OptimConfig, Recipe, SelfgenConfig, TrainConfig
from selfgen_ds.data.batches import collate
from selfgen_ds.data.encoding import Format
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.samples import first_rows, load
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.engine.step import train_step
from selfgen_ds.methods.mixture import mix, replacement_mask
from selfgen_ds.model.policy import Sampling
from selfgen_ds.scaling.steps import count_invalidations
from selfgen_ds.setup.prepare import prepare
from tests.distributed import runs
from tests.ranks import Ranks
from tests.tiers import matrix
from tests.trained import texts, token_by_token, trained_model

SEED = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in texts(18)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    trained_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def settings(folder: Path, packing: bool, selfgen: SelfgenConfig) -> Recipe:
    return runs.recipe(
        folder,
        seed=SEED,
        deepspeed=runs.write_limited_json(folder),
        data=DataConfig(train=str(folder / "rows.jsonl"), max_length=100, packing=packing),
        model=ModelConfig(name_or_path=str(folder / "model"), dtype="float32"),
        train=TrainConfig(epochs=1, micro_batch_size=2, gradient_accumulation_steps=2),
        optim=OptimConfig(learning_rate=0.0),  # steps that leave the model as it is
        selfgen=selfgen,
    )


def exact_steps(recipe: Recipe) -> dict[str, Any]:
    """Return contexts by step and sample, passes and rows by step, and the traces that ZeRO-3 discarded."""
    run = prepare(recipe, set())
    thrown_away = count_invalidations(run.engine)
    contexts: dict[tuple[int, int], list[int]] = {}
    passes, rows = [], []
    for step in range(run.total_steps):
        batches = run.method.contexts(run.step_batches.at(step), run.policy, step)
        passes.append(run.method.passes)
        ids = [int(i) for batch in batches for i in batch.sample_ids[batch.sample_ids >= 0].unique()]
        rows.append(len(ids))
        for i in ids:
            contexts[step, i] = [t for batch in batches for t in batch.context_ids[batch.sample_ids == i].tolist()]
        train_step(run.engine, batches, 0.0)
    return {"contexts": contexts, "passes": passes, "rows": rows, "thrown away": len(thrown_away)}


def together(results: Iterable[dict[str, Any]]) -> dict[tuple[int, int], list[int]]:
    return {key: context for result in results for key, context in result["contexts"].items()}


def samples_of(recipe: Recipe) -> list[TrainingRow]:
    return first_rows(load(recipe.data.train, "train", byte_tokenizer(), Format(max_length=100)))


@matrix(
    ("packing", "p", "temperature", "top_p"),
    [(False, 1.0, 0.7, 1.0), (False, 0.1, 2.0, 1.0), (True, 0.5, 1.0, 0.9), (True, 1.0, 1.5, 1.0)],
)
def test_a_sharded_model_draws_what_a_loop_over_the_tokens_draws(
    two_ranks: Ranks, one_rank: Ranks, folder: Path, packing: bool, p: float, temperature: float, top_p: float
) -> None:
    selfgen = SelfgenConfig(replace_probability=p, temperature=temperature, top_p=top_p, passes="exact")
    two = two_ranks.run(exact_steps, settings(folder, packing, selfgen))
    contexts = together(two)
    samples = {sample.sample_id: sample for sample in samples_of(settings(folder, packing, selfgen))}
    assert {sample for _, sample in contexts} == set(samples)
    sampling = Sampling(temperature=temperature, top_p=top_p)
    for step in range(len(two[0]["passes"])):
        here = [sample for s, sample in contexts if s == step]
        alone = collate([[samples[sample]] for sample in here])
        mask = replacement_mask(alone, p, (hashing.REPLACE, SEED, step))
        expected = token_by_token(trained_model(), alone, mask, sampling, (hashing.DRAW, SEED, step))
        assert [contexts[step, sample] for sample in here] == expected
    assert two[0]["passes"] == two[1]["passes"]
    assert max(two[0]["passes"]) > 1
    assert two[0]["rows"] != two[1]["rows"]
    if not packing:
        assert two[1]["rows"][-1] == 0  # 18 rows in steps of 8: the last has rows for the first rank only
    assert two[0]["thrown away"] == two[1]["thrown away"] == 0

    wide = settings(folder, packing, selfgen)
    wide.train.micro_batch_size = 4
    (one,) = one_rank.run(exact_steps, wide)
    assert one["contexts"] == contexts
    assert one["passes"] == two[0]["passes"]


def chains(recipe: Recipe, gathered: bool) -> tuple[int, list[int]]:
    """Give rank 0 no row, then a short answer, then a long one, and rank 1 the reverse."""
    run = prepare(recipe, set())
    some = sorted(first_rows(run.samples), key=lambda sample: len(sample))
    held = [[], [some[0]], [some[-1]]]
    passes = []
    for mine in held if dist.get_rank() == 0 else held[::-1]:
        batches = [collate([[sample] for sample in mine])]
        keys = (hashing.DRAW, SEED, 0)
        masks = [batch.replaceable_mask for batch in batches]
        with run.policy.gathered(100) if gathered else nullcontext():
            passes.append(mix(batches, run.policy, masks, "exact", keys)[1])
    return len(some[-1].response_ids), passes


def test_ranks_with_chains_of_any_length_stop_together(two_ranks: Ranks, folder: Path) -> None:
    selfgen = SelfgenConfig(temperature=3.0)
    (longest, passes), other = two_ranks.run(chains, settings(folder, False, selfgen), False, timeout=60.0)
    assert (longest, passes) == other
    assert passes[0] == passes[2] > passes[1] > 1
    assert passes[0] < longest


def test_ranks_with_chains_of_any_length_draw_them_in_order_together(two_ranks: Ranks, folder: Path) -> None:
    selfgen = SelfgenConfig(temperature=3.0)
    (_, passes), (_, other) = two_ranks.run(chains, settings(folder, False, selfgen), True, timeout=60.0)
    assert passes == other
    assert passes[0] == passes[2] == 2  # one pass in parallel, then one in order
