"""Check steps whose loss is not finite, mixtures whose draws all equal the reference, and what a step waits for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from selfgen_ds import metrics_logger
from selfgen_ds.config import CheckpointConfig, ModelConfig, Recipe, SelfgenConfig, TrainConfig
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.engine import step
from selfgen_ds.model import policy, transfer
from selfgen_ds.setup import build
from selfgen_ds.setup.prepare import prepare
from tests.distributed import runs
from tests.ranks import Ranks
from tests.tiers import matrix


def poisoned_model(folder: Path) -> str:
    """Save a model whose loss is NaN for any row with a `~`."""
    path = runs.write_model(folder)
    model = AutoModelForCausalLM.from_pretrained(path)
    token = byte_tokenizer()("~")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(path)
    return path


def poisoned_recipe(folder: Path, rows: list[str], stage: int, **changes: object) -> Recipe:
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for text in rows:
            file.write(json.dumps({"prompt": "x", "completion": text}) + "\n")
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    model = ModelConfig(name_or_path=poisoned_model(folder), dtype="float32")
    return runs.recipe(folder, model=model, deepspeed=str(folder / "ds.json"), **changes)


@contextmanager
def letting_poison_in() -> Iterator[None]:
    """Skip the check that refuses a model with NaN in its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compare_with_source", lambda *_, **__: None)
        yield


def train_poisoned(settings: Recipe) -> None:
    with letting_poison_in():
        runs.run_training(settings)


def dropped_steps(settings: Recipe, number: int) -> tuple[list[bool], list[list[int]], bool]:
    with letting_poison_in():
        run = prepare(settings, set())
    results, _ = runs.steps(run, number)
    # The poisoned weight is a matrix; its NaN would reach every other weight in a step that was not dropped.
    norms = [runs.whole(p) for p in run.engine.module.parameters() if getattr(p, "ds_numel", p.numel()) < 100]
    finite = bool(torch.isfinite(torch.cat(norms)).all())
    return [r.applied for r in results], [r.suspects for r in results], finite


@matrix(("stage", "method"), [(3, "scheduled_sampling"), (1, "sft"), (2, "sft"), (3, "sft")])
def test_a_step_that_is_not_finite_on_one_rank_is_dropped_on_all_and_its_samples_are_named(
    two_ranks: Ranks, tmp_path: Path, stage: int, method: str
) -> None:
    rows = ["abc"] * 15 + ["a~~~~~~~~c"]  # so many `~` that a mixture leaves some of them in place
    settings = poisoned_recipe(
        tmp_path,
        rows,
        stage,
        train=TrainConfig(max_steps=4, micro_batch_size=1, gradient_accumulation_steps=2),
        selfgen=runs.SFT if method == "sft" else runs.MIXING,
    )
    (applied, suspects, finite), other = two_ranks.run(dropped_steps, settings, 4)
    assert other == (applied, suspects, finite)
    assert sorted(applied) == [False, True, True, True]
    assert [bad for bad in suspects if bad] == [[15]]
    assert suspects[applied.index(False)] == [15]
    assert finite


def test_stage_0_which_cannot_drop_a_step_stops(two_ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeRO stage 0 cannot drop a step"):
        two_ranks.run(dropped_steps, poisoned_recipe(tmp_path, ["a~c"] * 4, 0), 1)


def test_a_run_stops_after_the_set_number_of_dropped_steps_in_a_row(two_ranks: Ranks, tmp_path: Path) -> None:
    train = TrainConfig(max_steps=9, micro_batch_size=1, max_nonfinite_steps=3)
    settings = poisoned_recipe(tmp_path, ["a~c"] * 4, 3, train=train, selfgen=runs.SFT)
    with pytest.raises(AssertionError, match="3 steps in a row were dropped"):
        two_ranks.run(train_poisoned, settings)
    assert [(row["loss"], row["dropped"]) for row in runs.metrics(settings)] == [(None, 1)] * 3


def test_a_run_whose_last_step_was_dropped_is_not_done(two_ranks: Ranks, tmp_path: Path) -> None:
    train = TrainConfig(max_steps=2, micro_batch_size=1, max_nonfinite_steps=3)
    settings = poisoned_recipe(tmp_path, ["a~c"] * 4, 3, train=train, selfgen=runs.SFT)
    with pytest.raises(AssertionError, match="the last step was dropped, 2 in a row"):
        two_ranks.run(train_poisoned, settings)
    assert not (Path(settings.output_dir) / "model").exists()
    assert (Path(settings.output_dir) / "checkpoints" / "step-000002").exists()


def test_a_model_with_nan_in_its_files_is_refused_by_the_tensor_s_name(two_ranks: Ranks, tmp_path: Path) -> None:
    settings = poisoned_recipe(tmp_path, ["abc"] * 4, 3)
    with pytest.raises(AssertionError, match=r"model\.embed_tokens\.weight holds NaN or infinity"):
        two_ranks.run(runs.first_step, settings)


def export_after_damage(settings: Recipe) -> None:
    run = prepare(settings, set())
    if dist.get_rank() == 1:
        parameter = run.engine.module.get_output_embeddings().weight
        getattr(parameter, "ds_tensor", parameter).data[-1] = float("inf")
    runs.export(run, Path(settings.output_dir) / "model")


@matrix("stage", [3, 0])
def test_a_weight_that_is_not_finite_on_one_rank_is_exported_by_none(
    two_ranks: Ranks, folder: Path, stage: int
) -> None:
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    settings = runs.recipe(folder, deepspeed=str(folder / "ds.json"))
    with pytest.raises(AssertionError, match=r"rank 0:[\s\S]*the first are in lm_head\.weight[\s\S]*rank 1:"):
        two_ranks.run(export_after_damage, settings)
    assert not (Path(settings.output_dir) / "model").exists()


def gradient_norms(settings: Recipe) -> list[float]:
    run = prepare(settings, set())
    return [result.grad_norm for result in runs.steps(run, 2)[0]]


def test_the_gradient_norm_is_the_same_at_every_stage(two_ranks: Ranks, folder: Path) -> None:
    norms = []
    for stage in range(4):
        (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        settings = runs.recipe(folder, deepspeed=str(folder / "ds.json"), selfgen=runs.SFT)
        settings.model = ModelConfig(name_or_path=runs.write_model(folder), dtype="float32")
        norms.append(two_ranks.run(gradient_norms, settings)[0])
    assert norms[0][0] > 0
    assert norms == [pytest.approx(norms[3], rel=1e-5)] * 4


def warnings_of(settings: Recipe) -> list[str]:
    """Run a training that watches the draws of its last 20 steps, and return its warnings."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect(level=logging.WARNING)
    logging.getLogger("selfgen_ds").addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics_logger, "_WATCHED_STEPS", 20)
            runs.run_training(settings)
    finally:
        logging.getLogger("selfgen_ds").removeHandler(handler)
    return messages


@matrix(("temperature", "warned"), [(0.01, True), (5.0, False)])
def test_a_mixture_that_draws_the_reference_is_called_sft_in_all_but_name(
    two_ranks: Ranks, tmp_path: Path, temperature: float, warned: bool
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "bbbbbbbb"}\n' * 8)
    settings = runs.recipe(
        tmp_path,
        selfgen=SelfgenConfig(replace_probability=0.5, temperature=temperature),
        train=TrainConfig(max_steps=50, micro_batch_size=4),
        checkpoint=CheckpointConfig(every=1000),
    )
    messages = two_ranks.run(warnings_of, settings)[0]
    assert any("sft in all but name" in message for message in messages) == warned


def waits_of_steps(settings: Recipe, number: int) -> list[int]:
    """Return how often the host fetches a result from the device, step by step."""
    run, waits = prepare(settings, set()), list[int]()

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        waits[-1] += 1
        return transfer.to_host(tensor)

    with pytest.MonkeyPatch.context() as patch:
        for module in (step, policy):
            patch.setattr(module, "to_host", counted)
        for i in range(number):
            waits.append(0)
            batches = run.method.contexts(run.step_batches.at(i), run.policy, i)
            step.train_step(run.engine, batches, settings.optim.label_smoothing)
    return waits


@pytest.mark.parametrize(("method", "passes", "waits"), [("sft", None, 1), ("scheduled_sampling", 2, 3)])
def test_the_host_waits_once_for_a_step_and_once_for_a_pass(
    two_ranks: Ranks, tmp_path: Path, method: str, passes: int | None, waits: int
) -> None:
    selfgen = runs.SFT if method == "sft" else replace(runs.MIXING, passes=passes)
    runs.write_rows(tmp_path)
    train = TrainConfig(max_steps=3, micro_batch_size=2, gradient_accumulation_steps=2)
    settings = runs.recipe(tmp_path, train=train, selfgen=selfgen)
    for counts in two_ranks.run(waits_of_steps, settings, 3):
        assert counts == [waits] * 3
