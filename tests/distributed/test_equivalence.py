"""Check that ranks, accumulation, ZeRO stage, and a mixture with probability 0 do not change the result."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from selfgen_ds import hashing
from selfgen_ds.checkpoint.export import export_checkpoint
from selfgen_ds.config import ModelConfig, OptimConfig, Recipe, SelfgenConfig, TrainConfig
from selfgen_ds.engine.step import StepResult
from selfgen_ds.methods.mixture import replacement_mask
from selfgen_ds.model.policy import Sampling
from selfgen_ds.setup.prepare import prepare
from tests.architectures import ARCHITECTURES, attention
from tests.distributed import runs
from tests.ranks import Ranks
from tests.tiers import matrix
from tests.unit.test_policy import reference_context


def from_saved(folder: Path, **changes: object) -> Recipe:
    model = folder / "model"
    path = str(model) if model.exists() else runs.write_model(folder)
    return runs.recipe(folder, model=ModelConfig(name_or_path=path, dtype="float32"), **changes)


def assert_same(one: tuple, other: tuple) -> None:
    """Check that losses and parameters are equal to float32 tolerance, and contexts exactly."""
    assert one[2] == other[2]
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for name, parameter in one[1].items():
        # Adam turns rounding in a gradient near 0 into a visible step. The absolute tolerance is a fiftieth of a step.
        assert torch.allclose(parameter, other[1][name], rtol=1e-4, atol=2e-4), name


@pytest.mark.check
def test_a_mixture_that_draws_nothing_is_sft_bit_for_bit(two_ranks: Ranks, folder: Path) -> None:
    weights = []
    nothing_drawn = {
        "probability": replace(runs.MIXING, replace_probability=0.0),
        "clean": replace(runs.MIXING, clean_share=1.0),
        "no differing token": replace(runs.MIXING, max_differing_tokens=0),
        "span": replace(runs.MIXING, position="span", span_tokens=3, replace_probability=0.0),
        "noise": replace(runs.MIXING, method="noise", replace_probability=0.0),
        "ended": replace(runs.MIXING, final_share=1.0),
    }
    for name, selfgen in ({"sft": runs.SFT} | nothing_drawn).items():
        settings = runs.recipe(folder, selfgen=selfgen, output_dir=str(folder / name))
        two_ranks.run(runs.run_training, settings)
        weights.append((folder / name / "model" / "model.safetensors").read_bytes())
    assert len(set(weights)) == 1


@pytest.mark.check
def test_two_ranks_equal_one(two_ranks: Ranks, one_rank: Ranks, folder: Path) -> None:
    wide = TrainConfig(max_steps=4, micro_batch_size=4, gradient_accumulation_steps=2)
    one = one_rank.run(runs.losses_parameters_contexts, from_saved(folder, train=wide), 4)
    two = two_ranks.run(runs.losses_parameters_contexts, from_saved(folder), 4)
    contexts = two[0][2] | two[1][2]
    assert_same((*two[0][:2], contexts), one[0])


def test_weights_from_scratch_are_the_same_for_every_world_size(
    two_ranks: Ranks, one_rank: Ranks, folder: Path
) -> None:
    one = one_rank.run(runs.losses_parameters_contexts, runs.recipe(folder), 0)[0][1]
    two = two_ranks.run(runs.losses_parameters_contexts, runs.recipe(folder), 0)[0][1]
    assert all(torch.equal(one[name], two[name]) for name in one | two)
    other = one_rank.run(runs.losses_parameters_contexts, runs.recipe(folder, seed=4), 0)[0][1]
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_bfloat16_trains_like_float32_to_its_rounding(two_ranks: Ranks, folder: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        settings = from_saved(folder)
        settings.model.dtype = dtype
        losses[dtype] = two_ranks.run(runs.losses_parameters_contexts, settings, 4)[0][0]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]


def test_accumulation_equals_one_big_batch(one_rank: Ranks, folder: Path) -> None:
    small = TrainConfig(max_steps=4, micro_batch_size=1, gradient_accumulation_steps=8)
    big = TrainConfig(max_steps=4, micro_batch_size=8)
    results = [one_rank.run(runs.losses_parameters_contexts, from_saved(folder, train=t), 4)[0] for t in (small, big)]
    assert_same(*results)


@matrix("stage", [pytest.param(0, marks=pytest.mark.check), 1, 2])
def test_zero_3_equals_lower_stages(two_ranks: Ranks, folder: Path, stage: int) -> None:
    lower = folder / "lower.json"
    lower.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    zero3 = two_ranks.run(runs.losses_parameters_contexts, from_saved(folder), 4)
    other = two_ranks.run(runs.losses_parameters_contexts, from_saved(folder, deepspeed=str(lower)), 4)
    assert_same(zero3[0], other[0])


@matrix(
    "optim",
    [
        OptimConfig(learning_rate=1e-2, weight_decay=0.1, warmup_ratio=0.0),
        OptimConfig(learning_rate=1e-2, warmup_ratio=0.5, schedule="linear", label_smoothing=0.2),
        OptimConfig(learning_rate=1e-2, betas=(0.8, 0.9), epsilon=1e-5, schedule="constant", max_grad_norm=0.5),
    ],
    ids=["decay, cosine", "warm-up, linear, smoothing", "betas, constant, clipping"],
)
def test_training_equals_plain_torch(two_ranks: Ranks, folder: Path, optim: OptimConfig) -> None:
    train = TrainConfig(max_steps=6, micro_batch_size=2, gradient_accumulation_steps=2)
    settings = from_saved(folder, train=train, optim=optim)
    (folder / "model").rename(folder / "start")
    settings.model.name_or_path = str(folder / "start")
    two_ranks.run(runs.run_training, settings)
    contexts = two_ranks.run(runs.contexts_of, settings, 6)
    losses, rates, norms, parameters, _ = plain_training(settings, contexts[0] | contexts[1], 6)
    rows = runs.metrics(settings)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-3)
    trained = dict(AutoModelForCausalLM.from_pretrained(f"{settings.output_dir}/model").named_parameters())
    for name, parameter in parameters.items():
        assert torch.allclose(trained[name], parameter, rtol=1e-4, atol=2e-4), name


def plain_training(
    settings: Recipe,
    contexts: dict[tuple[int, int], list[int]],
    steps: int,
    model: PreTrainedModel | None = None,
) -> tuple[list[float], list[float], list[float], dict[str, torch.Tensor], list[float]]:
    """Run the same steps without DeepSpeed, row by row with full logits: no ZeRO, no accumulation, no masks.

    Args:
        contexts: The context of each (step, sample id).

    Returns:
        Losses, learning rates, and gradient norms by step, the parameters at the end, and router losses by step.
    """
    samples = runs.samples_of(settings)
    model = model or plain_model(settings)
    router_loss_of: Any = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    optim = settings.optim
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=optim.betas,
        eps=optim.epsilon,
    )
    losses, rates, norms, router_losses = [], [], [], []
    for step in range(steps):
        warm_up = round(optim.warmup_ratio * steps)
        x = (step - warm_up) / (steps - warm_up)
        after = {"constant": 1.0, "linear": 1 - x, "cosine": 0.5 * (1 + math.cos(math.pi * x))}[optim.schedule]
        rates.append(optim.learning_rate * (step / warm_up if step < warm_up else after))
        total, targets, router_loss = torch.zeros(()), 0, torch.zeros(())
        micro_batches = runs.micro_batches_of(settings, samples, step)
        for batch in micro_batches:
            routed = []
            for sample in [s for s in batch.sample_ids[:, 0].tolist() if s >= 0]:
                context = torch.tensor([contexts[step, sample]])
                response = samples[sample].response_ids.tolist()
                extra = {"output_router_logits": True} if router_loss_of else {}
                # Nothing is predicted from the last token, so the router loss does not count its experts.
                output = model(context[:, :-1], **extra)
                logits = output.logits[0, -len(response) :]
                total = total + torch.nn.functional.cross_entropy(
                    logits, torch.tensor(response), reduction="sum", label_smoothing=optim.label_smoothing
                )
                targets += len(response)
                if router_loss_of:
                    routed.append(output.router_logits)
            if routed:
                layers = tuple(torch.cat(layer) for layer in zip(*routed, strict=True))
                router_loss = router_loss + router_loss_of(layers, model.num_experts, model.num_experts_per_tok)
        router_loss = router_loss / len(micro_batches)
        (total / targets + getattr(model.config, "router_aux_loss_coef", 0.0) * router_loss).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm or math.inf).item())
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / targets)
        router_losses.append(router_loss.item())
    return losses, rates, norms, {name: p.detach() for name, p in model.named_parameters()}, router_losses


def plain_model(settings: Recipe) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        settings.model.name_or_path, attn_implementation=settings.model.attn_implementation
    )


def train_and_export(settings: Recipe, number: int) -> tuple[list[StepResult], dict[tuple[int, int], list[int]]]:
    """Export, run some steps, save a checkpoint, and export again. Return the steps' results and contexts."""
    run = prepare(settings, set())
    folder = Path(settings.output_dir)
    runs.export(run, folder / "untrained")
    results = runs.steps(run, number)
    runs.save(run, settings, number)
    runs.export(run, folder / "trained")
    return results


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of an exported model."""
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


# The architectures that differ under ZeRO-3 or in the export: tied weights and capped logits, an untied scaled head,
# transposed matrices, biases, and two mixtures of experts whose stored tensors are converted when they are loaded.
@matrix("name", ["gemma2", "granite", "gpt2", "phi", "mixtral", "qwen2_moe"])
def test_an_architecture_is_trained_as_plain_transformers_does_and_goes_out_as_it_came_in(
    two_ranks: Ranks, folder: Path, name: str
) -> None:
    settings = runs.recipe(
        folder,
        model=ModelConfig(
            name_or_path=runs.write_model_of(folder, ARCHITECTURES[name] | {"initializer_range": 0.2}),
            tokenizer="byte",  # the class that a folder's tokenizer is loaded as depends on the model type
            dtype="float32",
            attn_implementation=attention(name),
        ),
        # With this epsilon, a gradient of nothing but rounding makes no visible step.
        optim=OptimConfig(learning_rate=1e-2, weight_decay=0.1, epsilon=1e-4, warmup_ratio=0.0, max_grad_norm=0.0),
        train=TrainConfig(epochs=0.6, micro_batch_size=2, gradient_accumulation_steps=2),  # 3 steps of 8 rows
    )
    (results, contexts), (_, others) = two_ranks.run(train_and_export, settings, 3)
    contexts |= others
    assert_contexts_are_drawn_from(plain_model(settings), settings, contexts)

    losses, _, _, parameters, router_losses = plain_training(settings, contexts, 3)
    assert [r.loss for r in results] == pytest.approx(losses, rel=1e-5)
    if "router_aux_loss_coef" in ARCHITECTURES[name]:
        assert [r.router_loss for r in results] == pytest.approx(router_losses, rel=1e-5)
    else:
        assert [r.router_loss for r in results] == [None] * 3

    output = Path(settings.output_dir)
    trained = dict(AutoModelForCausalLM.from_pretrained(output / "trained").named_parameters())
    assert trained.keys() == parameters.keys()
    for parameter, expected in parameters.items():
        assert torch.allclose(trained[parameter], expected, rtol=1e-4, atol=2e-4), parameter

    assert_same_tensors(stored(folder / "model"), stored(output / "untrained"))
    export_checkpoint(output / "checkpoints" / "step-000003", folder / "exported")
    assert_same_tensors(stored(output / "trained"), stored(folder / "exported"))
    assert stored(folder / "model").keys() == stored(folder / "exported").keys()


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


def assert_contexts_are_drawn_from(
    model: PreTrainedModel, settings: Recipe, contexts: dict[tuple[int, int], list[int]]
) -> None:
    """Check the contexts of the first step against plain transformers."""
    changed = 0
    sampling = Sampling(temperature=settings.selfgen.temperature)
    for batch in runs.micro_batches_of(settings, runs.samples_of(settings), 0):
        mask = replacement_mask(batch, settings.selfgen.replace_probability, (hashing.REPLACE, settings.seed, 0))
        for row, sample in enumerate(batch.sample_ids[:, 0].tolist()):
            expected = reference_context(model, batch, row, mask, 1, sampling, settings.seed, 0)
            assert contexts[0, sample] == expected
            changed += expected != batch.target_ids[row, : len(expected)].tolist()
    assert changed >= 4


def test_the_drawn_contexts_of_a_saved_model_are_the_same_in_any_batch_shape(one_rank: Ranks, folder: Path) -> None:
    selfgen = SelfgenConfig(replace_probability=1.0, passes=3)
    shapes = [TrainConfig(max_steps=1, micro_batch_size=m, gradient_accumulation_steps=8 // m) for m in (1, 2, 8)]
    contexts = [
        one_rank.run(runs.losses_parameters_contexts, from_saved(folder, train=t, selfgen=selfgen), 1)[0][2]
        for t in shapes
    ]
    assert contexts[0] == contexts[1] == contexts[2]
