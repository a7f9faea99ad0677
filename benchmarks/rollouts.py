"""Answers a second from a ZeRO-3 engine: weights gathered once, sharded and in step, and plain transformers.

    deepspeed --num_accelerators 2 benchmarks/rollouts.py --config recipes/gsm8k.yaml --data.train FILE

Takes a recipe and its overrides as `train` does, and prints median and quartiles of new tokens a second over all
ranks, the gathering included, in turn on one engine. `plain` is one `generate()` of the whole batch by an unsharded
model of the same size on every rank. No answer ends early, so that all compute the same number of tokens.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from selfgen_ds.config import Recipe
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.engine import launch, rollouts
from selfgen_ds.engine.model import from_config, model_config
from selfgen_ds.engine.policy import EnginePolicy
from selfgen_ds.inputs import load_data
from selfgen_ds.methods import noise
from selfgen_ds.prepare import prepare

_ROWS, _PROMPT, _TOKENS, _TURNS = 8, 64, 128, 5


def draws(prompts: Tensor, positions: Tensor) -> Tensor:
    return noise.uniform(noise.EVALUATION, prompts, positions)


def timed(action: Callable[[], object]) -> float:
    """Seconds until all ranks are done."""
    dist.barrier()
    started = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - started


def rolled_out(policy: EnginePolicy, prompts: list[list[int]], free: Callable[[], int]) -> float:
    reading, rollouts.free_bytes = rollouts.free_bytes, free

    def action() -> None:
        with policy.gathered(max(map(len, prompts)) + _TOKENS):
            policy.rows_at_once = _ROWS
            answers = policy.complete(prompts, _TOKENS, draws)
        assert all(len(answer) == _TOKENS for answer in answers)

    seconds = timed(action)
    rollouts.free_bytes = reading
    return seconds


@torch.no_grad()
def generated(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    ids, mask = rollouts._padded(prompts, model.device)
    settings = GenerationConfig(max_new_tokens=_TOKENS, do_sample=True, pad_token_id=0)
    model.generate(ids, attention_mask=mask, generation_config=settings)


def main() -> None:
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recipe)
    options = parser.instantiate(parser.parse_args([a for a in sys.argv[1:] if not a.startswith("--local_rank")]))
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(**{name: value for name, value in vars(options).items() if name != "config"})
        # before there is a DeepSpeed configuration, which would shard it
        plain = from_config(recipe.model, model_config(recipe.model, load_tokenizer(recipe.model))).eval()
        run = prepare(replace(recipe, output_dir=folder), {"output_dir"})
        run.policy.end_tokens = [run.policy.model.config.vocab_size]  # no token is
        [samples] = load_data(recipe, run.tokenizer)
        first = dist.get_rank() * _ROWS
        prompts = [samples[i].prompt_ids[:_PROMPT].tolist() for i in range(first, first + _ROWS)]
        rates: dict[str, list[float]] = {"gathered": [], "sharded": [], "plain": []}
        for turn in range(_TURNS + 1):
            seconds = {
                "gathered": rolled_out(run.policy, prompts, lambda: 10**15),
                "sharded": rolled_out(run.policy, prompts, lambda: 0),
                "plain": timed(lambda: generated(plain, prompts)),
            }
            for name, value in seconds.items() if turn else ():  # the first one also fills the caches
                rates[name].append(_ROWS * _TOKENS * dist.get_world_size() / value)
        if dist.get_rank() == 0:
            for name, values in rates.items():
                low, median, high = np.percentile(values, [25, 50, 75])
                ratio = median / np.median(rates["plain"])
                print(f"{name:10} {median:8.0f} tokens/s [{low:.0f}, {high:.0f}], {ratio:.2f} x plain")
        dist.barrier()
    launch.leave_process_group()


if __name__ == "__main__":
    main()
