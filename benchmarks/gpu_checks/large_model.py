"""Answers and passes of a model of the size of Llama 3 8B, with random weights: the time of a token and of a pass."""

from __future__ import annotations

import time

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from gpu_checks.rows import Report
from selfgen_ds import hashing
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.methods.mixture import replacement_mask
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.model.reductions import add_reductions

_P = 0.25


def check(report: Report) -> None:
    """Time answers with a KV cache, as a round on gathered weights draws them, and a pass over a step's contexts."""
    policy = _policy(report)
    _answers(report, policy)
    _passes(report, policy)


def _policy(report: Report) -> EnginePolicy:
    sizes, started = report.sizes, time.perf_counter()
    config = AutoConfig.for_model("llama", **sizes.generating_model)
    torch.manual_seed(0)
    with torch.device(report.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, sizes.dtype), attn_implementation="sdpa")
    model = add_reductions(model.eval())
    get_accelerator().synchronize()
    parameters = sum(p.numel() for p in model.parameters())
    report.figure(f"{parameters / 1e9:.3g} billion random weights", time.perf_counter() - started, "s")
    return EnginePolicy(model, end_tokens=[config.vocab_size], generation_batch_size=sizes.generated_rows)


def _answers(report: Report, policy: EnginePolicy) -> None:
    """Answer a batch of prompts; no answer ends early, because no token is the end token."""
    sizes = report.sizes
    vocabulary = policy.model.config.vocab_size
    random = np.random.default_rng(0)
    prompts = random.integers(0, vocabulary, (sizes.generated_rows, sizes.prompt_length)).tolist()

    def noise(numbers: Tensor, positions: Tensor) -> Tensor:
        return hashing.uniform(0, numbers, positions)

    policy.complete(prompts, 2, noise)  # sets up kernels
    seconds = _timed(lambda: policy.complete(prompts, 1, noise))
    started = time.perf_counter()
    answers = policy.complete(prompts, sizes.new_tokens, noise)
    per_token = (time.perf_counter() - started - seconds) / (sizes.new_tokens - 1)
    right = all(len(answer) == sizes.new_tokens and max(answer) < vocabulary for answer in answers)
    expected = f"{sizes.new_tokens} tokens each"
    report.result(f"{len(answers)} answers", expected, expected if right else str(sorted(map(len, answers))), right)
    report.figure(f"a token of {len(answers)} answers", 1000 * per_token, "ms", (22.0, 35.0))
    report.figure("answers", len(answers) / per_token, "tokens per second", (1300.0, 2900.0))


def _passes(report: Report, policy: EnginePolicy) -> None:
    sizes = report.sizes
    batch = _batch(policy.model.config.vocab_size, sizes.pass_rows, sizes.pass_length)
    mask = replacement_mask(batch, _P, (0, 0, 0))
    uniforms = hashing.uniform(1, batch.sample_ids, batch.position_ids)[mask]
    [first] = policy.draw([batch], [mask], [uniforms])
    drawn: list[Tensor] = []
    seconds = _timed(lambda: drawn.extend(policy.draw([batch], [mask], [uniforms])))
    same = bool(torch.equal(first, drawn[0]))
    report.result("the same pass twice draws", "the same tokens", "the same" if same else "others", same)
    name = f"a pass over {sizes.pass_rows} rows of {sizes.pass_length} tokens"
    report.figure(name, seconds, "s", (0.27, 0.35))


def _batch(vocabulary: int, rows: int, length: int) -> TokenBatch:
    """Return rows of random tokens, the first quarter of each a prompt."""
    ids = np.random.default_rng(1).integers(0, vocabulary, (rows, length))
    turns = np.array([[length // 4, length - 1, length]])
    return collate([[TrainingRow.reference(number, row, turns)] for number, row in enumerate(ids)])


def _timed(action: object) -> float:
    assert callable(action)
    get_accelerator().synchronize()
    started = time.perf_counter()
    action()
    get_accelerator().synchronize()
    return time.perf_counter() - started
