"""Tokens a second of what rounds draw, beside `generate()`, and what of a round is drawing and what is training.

Weights are random and no answer ends early: what is measured depends on lengths alone, but for the passes of an exact
mixture from sharded weights, of which random ones need more than trained ones.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm
from transformers import GenerationConfig

from selfgen_ds.config import Recipe, SelfgenConfig
from selfgen_ds.data.batches import collate
from selfgen_ds.data.samples import Sample
from selfgen_ds.data.stored_row import StoredRow
from selfgen_ds.engine.step import train_step
from selfgen_ds.methods.bash import Bash
from selfgen_ds.methods.method import RoundMethod
from selfgen_ds.methods.rac import Rac
from selfgen_ds.model import generation
from selfgen_ds.scaling.steps import Block, Engine, max_over_ranks

_ROWS = 16  # of a rank
_TURNS = 3  # that are timed
_P = 0.25


def measure(recipe: Recipe, json_config: dict[str, Any]) -> list[dict[str, Any]]:
    """One pass, the exact mixture and free-running answers, with weights gathered and sharded, in turn. Collective.

    A round is drawn as in training, then trained on for an epoch, in micro-batches of the recipe's size.
    """
    block = Block(accumulation=1, checkpointing=recipe.train.activation_checkpointing, mixtures=())
    bench = Engine(recipe, json_config, block)
    samples, answer = _samples(recipe, bench.vocabulary)
    longest = max(len(sample.input_ids) for sample in samples)
    methods = _methods(bench, answer)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    passes: dict[str, dict[str, int]] = {name: {} for name in methods}
    gathers = False

    def draw(method: RoundMethod, gathered: bool) -> tuple[list[StoredRow], dict[str, int]]:
        with bench.policy.gathered(longest) if gathered else nullcontext():
            return method.rows(samples, bench.policy, 0)

    def timed(name: str, what: str, action: Callable[..., Any], *arguments: Any) -> Any:
        dist.barrier()
        started = time.perf_counter()
        result = action(*arguments)
        get_accelerator().synchronize()
        seconds[name, what] += max_over_ranks([time.perf_counter() - started])
        return result

    def trained(name: str, rows: Sequence[StoredRow]) -> None:
        _train(bench, rows[: recipe.train.micro_batch_size])  # what was done before must not count here
        timed(name, "training", _train, bench, rows)

    with tqdm(desc="rollouts", total=_TURNS + 1, unit="turn", leave=False, disable=dist.get_rank() != 0) as bar:
        for turn in range(_TURNS + 1):
            for name, method in methods.items():
                rows, counts = timed(name, "gathered", draw, method, True)
                passes[name]["gathered"] = counts.get("passes", 0)
                trained(name, rows)
                if bench.policy.sharded:
                    _, counts = timed(name, "sharded", draw, method, False)
                    passes[name]["sharded"] = counts.get("passes", 0)
            trained("sft", [StoredRow.of(sample) for sample in samples])
            with bench.policy.gathered(longest):
                gathers = not bench.policy.sharded
                timed("generate", "generate", _generate, bench, samples, answer)
            if not turn:
                seconds.clear()  # made optimizer states and filled caches
            bar.update()
    bench.engine.destroy()
    tokens = _ROWS * answer * dist.get_world_size()

    def rate(name: str, what: str) -> float | None:
        return tokens / float(np.median(seconds[name, what])) if (name, what) in seconds else None

    plain, sft = rate("generate", "generate"), np.array(seconds["sft", "training"])
    found = []
    for name in methods:
        drawing, training = (np.array(seconds[name, what]) for what in ("gathered", "training"))
        rates = {what: rate(name, what) for what in ("gathered", "sharded")}
        found.append(
            {
                "draws": name,
                "passes": passes[name],
                "weights_fit_gathered": gathers,
                "tokens_per_second": rates | {"generate": plain},
                "ratio_to_generate": {what: r and plain and r / plain for what, r in rates.items()},
                "seconds": {what: s for (n, what), s in seconds.items() if n == name} | {"sft": sft.tolist()},
                "drawing_share": float(np.median(drawing / (drawing + training))),
                "epoch_time_ratio": float(np.median((drawing + training) / sft)),
            }
        )
    return found


def _samples(recipe: Recipe, vocabulary: int) -> tuple[list[Sample], int]:
    """Rows of random tokens on this rank and the length of their answers: an own answer fits between as well."""
    length = recipe.data.max_length
    answer, rank = 3 * length // 8, dist.get_rank()
    random = np.random.default_rng((recipe.seed, rank))
    samples = []
    for i, prompt in enumerate(np.linspace(length // 8, length // 4, _ROWS).astype(int).tolist()):
        ids = random.integers(0, vocabulary, prompt + answer)
        turns = np.array([[prompt, prompt + answer - 1, prompt + answer]])
        samples.append(Sample(sample_id=rank * _ROWS + i, input_ids=ids, turns=turns))
    return samples, answer


def _methods(bench: Engine, answer: int) -> dict[str, RoundMethod]:
    plan = bench.plan
    settings: dict[str, Any] = {"replace_probability": _P, "schedule": "constant"}
    rac = Rac(SelfgenConfig(method="rac", max_new_tokens=answer, sft_share=0.0), plan)
    rac.max_new_tokens = answer
    return {
        f"bash, p {_P:g}, 1 pass": Bash(SelfgenConfig(method="bash", passes=1, **settings), plan),
        f"bash, p {_P:g}, exact": Bash(SelfgenConfig(method="bash", passes="exact", **settings), plan),
        "rac, free-running": rac,
    }


def _train(bench: Engine, rows: Sequence[StoredRow]) -> None:
    size = bench.recipe.train.micro_batch_size
    for first in range(0, len(rows), size):
        batch = collate([[row.sample()] for row in rows[first : first + size]])
        train_step(bench.engine, [batch.to(bench.policy.device)], 0.0)


@torch.no_grad()
def _generate(bench: Engine, samples: list[Sample], answer: int) -> None:
    """One batch, as transformers has it."""
    ids, mask = generation.padded([sample.prompt_ids.tolist() for sample in samples], bench.policy.device)
    settings = GenerationConfig(
        max_new_tokens=answer, min_new_tokens=answer, do_sample=True, top_k=0, pad_token_id=0, use_cache=True
    )
    model = bench.engine.module
    model.generate(ids, attention_mask=mask, generation_config=settings, synced_gpus=bench.policy.sharded)
