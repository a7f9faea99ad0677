"""Check that ZeRO-3's record of the order of forwards stays valid: else a step takes 2 to 4 times the gathers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from selfgen_ds.config import CheckpointConfig, DataConfig, ModelConfig, Recipe, TrainConfig
from selfgen_ds.data.samples import first_rows
from selfgen_ds.engine.step import train_step
from selfgen_ds.evaluation.scores import evaluate
from selfgen_ds.scaling.steps import count_invalidations
from selfgen_ds.setup.prepare import prepare
from tests.architectures import ARCHITECTURES
from tests.distributed import runs
from tests.ranks import Ranks
from tests.tiers import matrix


def invalidations(settings: Recipe, evaluated: bool) -> int:
    """Run steps, perhaps an evaluation that generates and further steps; count the invalidations of the trace."""
    run = prepare(settings, set())
    seen = count_invalidations(run.engine)
    runs.steps(run, 3)
    if evaluated:
        few = first_rows(run.samples, 3)
        evaluate(run.policy, few, run.tokenizer, batch_size=2)
        runs.steps(run, 3)
    assert run.engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    return len(seen)


@matrix(
    ("start", "checkpointing", "limited"),
    [
        pytest.param("preset", True, True, marks=pytest.mark.check),
        ("saved", True, True),
        ("preset", False, True),
        ("preset", True, False),
    ],
)
def test_steps_with_a_pass_and_evaluations_never_invalidate_the_trace(
    two_ranks: Ranks, tmp_path: Path, start: str, checkpointing: bool, limited: bool
) -> None:
    runs.write_rows(tmp_path)
    settings = runs.recipe(tmp_path, selfgen=replace(runs.MIXING, passes=2))
    settings.train.activation_checkpointing = checkpointing
    if limited:
        settings.deepspeed = runs.write_limited_json(tmp_path)
    if start == "saved":
        settings.model = ModelConfig(name_or_path=runs.write_model(tmp_path), dtype="float32")
    assert two_ranks.run(invalidations, settings, True) == [0, 0]


@pytest.mark.slow
def test_ranks_that_choose_different_experts_do_not_invalidate_the_trace(two_ranks: Ranks, tmp_path: Path) -> None:
    runs.write_rows(tmp_path)
    settings = runs.recipe(tmp_path, deepspeed=runs.write_limited_json(tmp_path))
    settings.model.preset = ARCHITECTURES["mixtral"]
    assert two_ranks.run(invalidations, settings, True) == [0, 0]


@pytest.mark.slow
def test_the_steps_after_a_resume_do_not_invalidate_the_trace(two_ranks: Ranks, tmp_path: Path) -> None:
    runs.write_rows(tmp_path)
    settings = runs.recipe(tmp_path, checkpoint=CheckpointConfig(every=2))
    two_ranks.run(runs.run_training, settings)
    settings.resume = "auto"
    assert two_ranks.run(invalidations, settings, False) == [0, 0]


def test_a_pass_before_any_training_forward_does_invalidate_it(two_ranks: Ranks, tmp_path: Path) -> None:
    """The warm-up is needed, and the count of the other tests can be other than 0."""
    runs.write_rows(tmp_path)
    assert min(two_ranks.run(invalidations_without_warm_up, runs.recipe(tmp_path))) > 0


def invalidations_without_warm_up(settings: Recipe) -> int:
    from selfgen_ds.setup import build as module

    warm_up, module.warm_up = module.warm_up, lambda engine: None
    try:
        run = prepare(settings, set())
    finally:
        module.warm_up = warm_up
    seen = count_invalidations(run.engine)
    runs.steps(run, 3)
    return len(seen)


def layer_calls(settings: Recipe) -> tuple[int, int, int]:
    """Count the forwards of one layer's MLP in a training step, in a pass, and in the generation of 2 tokens."""
    run = prepare(settings, set())
    calls: list[None] = []
    run.engine.module.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))

    def count(action: object) -> int:
        before = len(calls)
        action()  # type: ignore[operator]
        return len(calls) - before

    batches = run.step_batches.at(0)
    contexts = count(lambda: run.method.contexts(batches, run.policy, 0))
    training = count(lambda: train_step(run.engine, batches, 0.0))
    generation = count(lambda: run.policy.complete([[65, 66]], 2))
    assert run.engine.module.training
    return training, contexts, generation


def test_activation_checkpointing_is_on_in_the_step_and_off_in_the_pass_and_in_generation(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    runs.write_rows(tmp_path)
    one_micro_batch = TrainConfig(max_steps=4, micro_batch_size=2)
    data = DataConfig(train=str(tmp_path / "rows.jsonl"), max_length=128)
    settings = runs.recipe(tmp_path, train=one_micro_batch, data=data)
    assert two_ranks.run(layer_calls, settings) == [(2, 1, 2)] * 2
    settings = runs.recipe(tmp_path, train=replace(one_micro_batch, activation_checkpointing=False))
    assert two_ranks.run(layer_calls, settings) == [(1, 1, 2)] * 2
