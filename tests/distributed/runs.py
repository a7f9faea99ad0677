"""Small runs for the distributed tests. Everything here is executed on the ranks."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from selfgen_ds.checkpoint import manifest, saving
from selfgen_ds.checkpoint.export import export_engine
from selfgen_ds.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    SelfgenConfig,
    TrainConfig,
)
from selfgen_ds.data.batches import StepBatches, TokenBatch
from selfgen_ds.data.encoding import Format
from selfgen_ds.data.samples import Samples, load
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.engine.step import StepResult, train_step
from selfgen_ds.setup.prepare import Run, prepare
from selfgen_ds.train import train
from tests.ranks import ROOT

PRESET: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MIXING = SelfgenConfig(replace_probability=0.5, temperature=2.0)
SFT = SelfgenConfig(method="sft")
YAML = """
output_dir: {folder}/run
deepspeed: ds_configs/zero3_cpu.json
model:
  preset: {{hidden_size: 32, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4}}
  tokenizer: byte
  dtype: float32
data: {{train: {folder}/rows.jsonl, max_length: 128}}
selfgen: {{method: scheduled_sampling, replace_probability: 0.5}}
train: {{max_steps: 2, micro_batch_size: 2}}
"""
"""The recipe of two steps on the rows in `folder`, as a user writes it."""
TIMED = {"step_time_s", "pass_time_s", "round_time_s", "tokens_per_second", "peak_memory_bytes"} | {
    "no_grad_tokens",
    "flops",
}
_NUMBERS = itertools.count()


def recipe(folder: Path, **changes: Any) -> Recipe:
    """Return the recipe of a run of a few steps on `folder/rows.jsonl`, in a folder of its own.

    Nothing in it is shared with another recipe, so that a test may change it.
    """
    settings: dict[str, Any] = {
        "output_dir": str(folder / f"run-{next(_NUMBERS)}"),
        "deepspeed": str(ROOT / "ds_configs" / "zero3_cpu.json"),
        "data": DataConfig(train=str(folder / "rows.jsonl"), max_length=128),
        "model": ModelConfig(preset=PRESET, tokenizer="byte", dtype="float32"),
        "selfgen": MIXING,
        "optim": OptimConfig(learning_rate=1e-2, weight_decay=0.1, warmup_ratio=0.0),
        "train": TrainConfig(max_steps=4, micro_batch_size=2, gradient_accumulation_steps=2),
        "checkpoint": CheckpointConfig(every=100),
        "eval": EvalConfig(),
        "seed": 3,
    }
    return copy.deepcopy(Recipe(**(settings | changes)))


def write_rows(folder: Path, count: int = 40) -> None:
    """Write rows of very different lengths to `folder/rows.jsonl`."""
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for i in range(count):
            words = " ".join(str((i * 7 + j * j) % 23) for j in range(1 + i * i % 11))
            file.write(json.dumps({"prompt": f"row {i}: ", "completion": words}) + "\n")


def write_limited_json(folder: Path, persistent: int = 0) -> str:
    """Write a JSON whose limits really release parameters: the default limits keep a small model gathered.

    Args:
        persistent: Parameters of fewer elements stay gathered even so.
    """
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": persistent,
        "stage3_prefetch_bucket_size": 20_000,
        "stage3_max_live_parameters": 20_000,
        "stage3_max_reuse_distance": 20_000,
    }
    (folder / "limited.json").write_text(json.dumps({"zero_optimization": zero}))
    return str(folder / "limited.json")


def write_whole_json(folder: Path) -> str:
    """Write a JSON whose limits never release parameters."""
    (folder / "whole.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10**9}})
    )
    return str(folder / "whole.json")


def write_model(folder: Path, **changes: Any) -> str:
    """Save a Llama with random weights, for runs that start from the same weights."""
    return write_model_of(folder, PRESET | changes)


def write_model_of(folder: Path, preset: dict[str, Any]) -> str:
    """Save a model of any type with random weights."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    fields = {"model_type": "llama", "vocab_size": len(tokenizer)} | special | preset
    path = folder / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def samples_of(settings: Recipe) -> Samples:
    """Return the rows of a recipe."""
    return load(settings.data.train, "train", byte_tokenizer(), Format(max_length=128))[0]


def micro_batches_of(settings: Recipe, samples: Samples, step: int) -> list[TokenBatch]:
    """Return all micro-batches that two ranks read in one step."""
    return [
        batch
        for rank in range(2)
        for batch in StepBatches(
            [samples],
            seed=settings.seed,
            step_size=settings.train.shape(2).rows,
            micro_batch_size=settings.train.shape(2).micro_batch_size,
            rank=rank,
            world_size=2,
            epochs=settings.train.epochs,
        ).at(step)
    ]


def run_training(settings: Recipe) -> None:
    """Train as `selfgen-ds train` does, without its launcher and its parser."""
    train(settings, set())


def steps(
    run: Run, number: int, label_smoothing: float = 0.0, first: int = 0
) -> tuple[list[StepResult], dict[tuple[int, int], list[int]]]:
    """Take the trainer's steps from `first` on. Return their results, and the contexts read by (step, sample id)."""
    results, contexts = [], {}
    for step in range(first, number):
        batches = run.method.contexts(run.step_batches.at(step), run.policy, step)
        for batch in batches:
            for sample in batch.sample_ids[batch.sample_ids >= 0].unique().tolist():
                contexts[step, sample] = batch.context_ids[batch.sample_ids == sample].tolist()
        results.append(train_step(run.engine, batches, label_smoothing))
    return results, contexts


def write(run: Run, settings: Recipe, step: int) -> saving.Unverified | None:
    """Write a checkpoint as the training loop does, without an evaluation."""
    checkpoint = manifest.Checkpoint(
        path=manifest.path_of(Path(settings.output_dir) / "checkpoints", step),
        step=step,
        step_size=run.step_batches.step_size,
        data=run.data_checksum,
        metrics={},
    )
    return saving.save(run.engine, run.tokenizer, run.config, run.source, checkpoint, run.folder.storage)


def save(run: Run, settings: Recipe, step: int) -> None:
    """Write a checkpoint, and wait until it is verified."""
    if unverified := write(run, settings, step):
        unverified.complete()


def export(run: Run, folder: Path) -> None:
    """Export the run's model as the training loop does."""
    export_engine(run.engine, folder, run.tokenizer, run.config, run.source)


def losses_parameters_contexts(settings: Recipe, number: int) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Return losses, parameters, and contexts of some steps, at any ZeRO stage."""
    run = prepare(settings, set())
    results, contexts = steps(run, number, settings.optim.label_smoothing)
    parameters = {name: whole(parameter) for name, parameter in run.engine.module.named_parameters()}
    return [r.loss for r in results], parameters, contexts


def contexts_of(settings: Recipe, number: int) -> dict[tuple[int, int], list[int]]:
    """Return the contexts that a run reads, found by running its steps again."""
    again = replace(settings, output_dir=settings.output_dir + "-again")
    return losses_parameters_contexts(again, number)[2]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """Return the whole of a parameter that may be partitioned. Collective."""
    with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
        return parameter.detach().clone()


def metrics(settings: Recipe) -> list[dict[str, float]]:
    with open(Path(settings.output_dir) / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def losses(run: Path) -> list[float]:
    """Return the loss of every step of a run, given its folder."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(settings: Recipe) -> bytes:
    """Return the bytes of the exported model."""
    return (Path(settings.output_dir) / "model" / "model.safetensors").read_bytes()


def first_step(settings: Recipe) -> int:
    """Return the step that a run resumes from."""
    return prepare(settings, set()).folder.first_step


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def untimed(settings: Recipe) -> list[dict[str, float]]:
    """Return the metrics of a run without times and memory, which differ each time."""
    return [{name: value for name, value in row.items() if name not in TIMED} for row in metrics(settings)]
