"""A step under ZeRO-3 computes what plain transformers computes, and a hundred steps need no more memory than ten."""

from __future__ import annotations

import gc

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from gpu_checks.recipes import small_recipe
from gpu_checks.rows import Report
from selfgen_ds.config import ModelConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.engine.step import train_step
from selfgen_ds.setup.prepare import Run, prepare

_TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2)}
"""Type -> the largest relative difference of the loss, and of the gradient's norm."""
_MIB = 1 << 20


def check(report: Report) -> None:
    """Compare a step in both types, then count memory in the type that is trained."""
    start = _write_model(report)
    for dtype in ("float32", "bfloat16"):
        unset_hf_deepspeed_config()  # otherwise transformers would shard the plain model as the run before
        plain = AutoModelForCausalLM.from_pretrained(start, dtype=getattr(torch, dtype)).to(report.device)
        model = ModelConfig(name_or_path=start, dtype=dtype)
        run = prepare(small_recipe(report, model=model, output_dir=str(report.folder / dtype)), set())
        _compare(report, run, plain, dtype)
        if dtype == report.sizes.dtype:
            _memory(report, run)
        run.engine.destroy()


def _write_model(report: Report) -> str:
    """Write a model with random weights, from which both sides start."""
    torch.manual_seed(0)
    tokenizer, path = byte_tokenizer(), report.folder / "start"
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model("llama", **report.sizes.model, **special, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def _compare(report: Report, run: Run, plain: PreTrainedModel, dtype: str) -> None:
    """Take a step, whose contexts the policy draws, and compute loss and gradient from the same contexts."""
    [batch] = run.method.contexts(run.step_batches.at(0), run.policy, 0)
    result = train_step(run.engine, [batch], 0.0)
    report.result(f"{dtype}: drawn tokens", "some", str(result.drawn), result.drawn > 0)
    loss, norm = _loss_and_norm(batch, plain)
    for name, ours, theirs, most in zip(
        ("loss", "gradient's norm"), (result.loss, result.grad_norm), (loss, norm), _TOLERANCES[dtype], strict=True
    ):
        apart = abs(ours - theirs) / theirs
        measured = f"{ours:.6g} and {theirs:.6g}, {apart:.1e} apart"
        report.result(f"{dtype}: {name}, ours and plain", f"at most {most:g} apart", measured, apart <= most)


def _loss_and_norm(batch: TokenBatch, model: PreTrainedModel) -> tuple[float, float]:
    """Return the loss and the gradient's norm of a plain model, from the logits of all positions."""
    context, target, mask = (t.to(model.device) for t in (batch.context_ids, batch.target_ids, batch.loss_mask))
    logits: Tensor = model(context[:, :-1]).logits
    loss = F.cross_entropy(logits[mask[:, 1:]].float(), target[mask])
    loss.backward()
    return float(loss), float(get_total_norm(p.grad for p in model.parameters()))


def _memory(report: Report, run: Run) -> None:
    """Count memory without Python's garbage collector, which the training loop runs every hundred steps alone."""
    memory = get_accelerator()
    gc.collect()
    gc.disable()
    allocated = {}
    for step in range(1, report.sizes.memory_steps + 1):
        batches = run.method.contexts(run.step_batches.at(step), run.policy, step)
        train_step(run.engine, batches, 0.0)
        if step in (10, report.sizes.memory_steps):
            allocated[step] = memory.memory_allocated()
    gc.enable()
    first, last = allocated.values()
    # A CPU has no allocator that counts: its figure is the process's resident memory.
    most = 4 if report.device == "cuda" else 64
    grown = (last - first) / _MIB
    expected = f"at most {most} MiB more"
    report.result(f"memory from step 10 to {max(allocated)}", expected, f"{grown:.2f} MiB more", grown <= most)
