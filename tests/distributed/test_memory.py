"""Check memory, measured as the largest sum of live tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from selfgen_ds.config import ModelConfig, Recipe, SelfgenConfig, TrainConfig
from selfgen_ds.data.samples import first_rows
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.engine import ds_config
from selfgen_ds.engine.step import train_step
from selfgen_ds.evaluation.scores import evaluate
from selfgen_ds.model.loading import build_model, model_config
from selfgen_ds.scaling.memory import LiveTensors
from selfgen_ds.setup.prepare import prepare
from tests.architectures import ARCHITECTURES
from tests.batches import padded
from tests.distributed import runs
from tests.ranks import Ranks
from tests.tiers import matrix

MIB = 2**20
WIDE = runs.PRESET | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 8192}


def loading_peak(settings: Recipe) -> tuple[int, int]:
    """Return the peak memory while the model is built, and the size of its parameters, both in bytes."""
    tokenizer = byte_tokenizer()
    config = model_config(settings.model, tokenizer)
    json_config = ds_config.read(settings.deepspeed)
    hf_config = ds_config.resolve(settings, json_config, dist.get_world_size(), config.hidden_size)
    with LiveTensors() as tensors:
        model = build_model(settings.model, config)
    assert hf_config.is_zero3()
    return tensors.peak, sum(4 * p.ds_numel for p in model.parameters())


@matrix("start", ["preset", "saved"])
def test_loading_takes_a_rank_its_share_and_the_largest_layer(two_ranks: Ranks, tmp_path: Path, start: str) -> None:
    """A rank may take its share, the largest tensor twice (once for the copy in flight), and 1 MiB."""
    model = ModelConfig(preset=WIDE, tokenizer="byte", dtype="float32")
    if start == "saved":
        model = ModelConfig(name_or_path=runs.write_model(tmp_path, **WIDE), dtype="float32")
    largest = 4 * 8192 * 256
    for most, parameters in two_ranks.run(loading_peak, runs.recipe(tmp_path, model=model)):
        assert most < parameters / 2 + 2 * largest + MIB
        assert 2 * largest + MIB < parameters / 2, "the test could not tell a share from the whole"


def sweep_and_step_peaks(settings: Recipe) -> tuple[int, int, int]:
    """Return the peak memory of the pass and of the training step over full rows, and the number of sweeps."""
    run = prepare(settings, set())
    rows, length = settings.train.shape(1).micro_batch_size, 64
    batches = [
        padded([[65]] * rows, [[66] * (length - 1)] * rows, [m * rows + i for i in range(rows)])
        for m in range(settings.train.gradient_accumulation_steps)
    ]
    train_step(run.engine, batches, 0.0)  # optimizer states and gradient buffers exist from here on
    with LiveTensors() as tensors:
        mixed = run.method.contexts(batches, run.policy, 0)
    sweep = tensors.peak
    tensors.reset()
    with tensors:
        train_step(run.engine, mixed, 0.0)
    return sweep, tensors.peak, run.policy.groups


@matrix(
    ("layers", "checkpointing", "vocabulary", "attention", "top_p", "groups"),
    [
        pytest.param(2, False, 258, "sdpa", 1.0, 3, marks=pytest.mark.check),
        (6, True, 8192, "sdpa", 0.9, 4),
        (2, True, 258, "eager", 1.0, 8),
    ],
)
def test_the_pass_stays_under_the_training_steps_peak_in_few_sweeps(
    two_ranks: Ranks,
    tmp_path: Path,
    layers: int,
    checkpointing: bool,
    vocabulary: int,
    attention: Literal["sdpa", "eager"],
    top_p: float,
    groups: int,
) -> None:
    runs.write_rows(tmp_path)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": layers, "vocab_size": vocabulary}
    settings = runs.recipe(
        tmp_path,
        deepspeed=runs.write_limited_json(tmp_path),
        model=ModelConfig(preset=runs.PRESET | shape, tokenizer="byte", dtype="float32", attn_implementation=attention),
        selfgen=SelfgenConfig(replace_probability=0.9, top_p=top_p),
        train=TrainConfig(
            max_steps=4, micro_batch_size=8, gradient_accumulation_steps=8, activation_checkpointing=checkpointing
        ),
    )
    for sweep, step, used in two_ranks.run(sweep_and_step_peaks, settings):
        print(f"{layers} layers, {vocabulary}, {attention}, {top_p}: {sweep / step:.2f} of the peak, {used} groups")
        assert sweep <= step
        assert used == groups


def gathered_after_a_pass(settings: Recipe) -> tuple[int, int]:
    """Run a pass after a training step; return the numbers of drawn tokens and of parameters left gathered."""
    run = prepare(settings, set())
    runs.steps(run, 1)
    batches = run.method.contexts(run.step_batches.at(1), run.policy, 1)
    left = [p for p in run.engine.module.parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
    return sum(int(batch.replaced_mask.sum()) for batch in batches), len(left)


def test_a_pass_leaves_no_parameter_gathered(two_ranks: Ranks, tmp_path: Path) -> None:
    runs.write_rows(tmp_path)
    settings = runs.recipe(tmp_path, deepspeed=runs.write_limited_json(tmp_path))
    for drawn, left in two_ranks.run(gathered_after_a_pass, settings):
        assert drawn > 0
        assert left == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_the_pass_of_other_architectures_stays_under_the_peak_too(two_ranks: Ranks, tmp_path: Path, name: str) -> None:
    runs.write_rows(tmp_path)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4} | ({"intermediate_size": 192} if name == "mixtral" else {})
    settings = runs.recipe(
        tmp_path,
        deepspeed=runs.write_limited_json(tmp_path),
        model=ModelConfig(preset=_renamed(ARCHITECTURES[name], sizes), tokenizer="byte", dtype="float32"),
        selfgen=SelfgenConfig(replace_probability=0.9),
        train=TrainConfig(max_steps=4, micro_batch_size=8, gradient_accumulation_steps=8),
    )
    for sweep, step, used in two_ranks.run(sweep_and_step_peaks, settings):
        print(f"{name}: {sweep / step:.2f} of the peak, {used} groups")
        assert sweep <= step
        assert used < 8


def _renamed(preset: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """Return a preset with other sizes, under the names that its model type has for them."""
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer"} if preset["model_type"] == "gpt2" else {}
    return preset | {names.get(name, name): size for name, size in sizes.items()}


def largest_tensor(settings: Recipe) -> tuple[int, int]:
    """Return the bytes of the largest tensor of pass, step, and evaluation, and the elements of all logits."""
    run = prepare(settings, set())
    batches = run.step_batches.at(0)
    samples = first_rows(run.samples)
    with LiveTensors() as tensors:
        train_step(run.engine, run.method.contexts(batches, run.policy, 0), 0.0)
        evaluate(run.policy, samples, run.tokenizer, batch_size=len(samples))
    return tensors.largest, batches[0].context_ids.numel() * run.engine.module.config.vocab_size


def test_no_path_makes_logits_of_a_whole_batch(two_ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "%s"}\n' % ("b" * 120) * 16)
    preset = runs.PRESET | {"vocab_size": 2000, "hidden_size": 16, "intermediate_size": 32}
    settings = runs.recipe(
        tmp_path,
        model=ModelConfig(preset=preset, tokenizer="byte", dtype="float32"),
        selfgen=SelfgenConfig(replace_probability=1.0),
        train=TrainConfig(max_steps=1, micro_batch_size=16),
    )
    for largest, logits in two_ranks.run(largest_tensor, settings):
        assert largest < 4 * logits / 2
