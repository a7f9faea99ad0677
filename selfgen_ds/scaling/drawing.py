"""Measure the cost of drawing a round: tokens per second compared with `generate()`, and the share of the drawing.

The weights are random and no answer ends early, because the costs depend on lengths alone. The exception is the number
of passes of an exact mixture: random weights need more of them than trained weights.
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
from transformers import GenerationConfig

from selfgen_ds.config import Recipe, SelfgenConfig
from selfgen_ds.data.batches import collate
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.engine.step import train_step
from selfgen_ds.methods.bash import Bash
from selfgen_ds.methods.method import Plan, RoundMethod
from selfgen_ds.methods.rac import Rac
from selfgen_ds.model import generation
from selfgen_ds.progress import bar
from selfgen_ds.ranks import process_group
from selfgen_ds.scaling.steps import Block, BlockBenchmark

_ROWS = 16  # per rank
_TURNS = 3  # timed turns
_P = 0.25


def block(recipe: Recipe) -> Block:
    """Return the block whose engine draws rounds and trains on them: without accumulation and without mixtures."""
    return Block(accumulation=1, checkpointing=recipe.train.activation_checkpointing, mixtures=())


def measure(recipe: Recipe, json_config: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure one pass, the exact mixture, and free-running answers, with gathered and with sharded weights, in turn.

    A round is drawn as in training, then trained on for an epoch in micro-batches of the recipe's size. Collective:
    every rank must call this, because the ranks draw and train together.

    Returns:
        The rows of `drawing` in `bench.json`.
    """
    rounds = _Rounds(recipe, json_config)
    with bar("rollouts", "turn", total=1 + _TURNS, leave=False, disable=dist.get_rank() != 0) as progress:
        for turn in range(1 + _TURNS):
            rounds.turn()
            if turn == 0:
                rounds.seconds.clear()  # the first turn creates the optimizer's states and fills caches
            progress.update()
    rounds.benchmark.engine.destroy()
    return rounds.rows()


class _Rounds:
    """Rounds of every method on one engine, and their times.

    Collective: every rank must construct and call this, because the ranks draw and train together.
    """

    def __init__(self, recipe: Recipe, json_config: dict[str, Any]) -> None:
        self.benchmark = BlockBenchmark(recipe, json_config, block(recipe))
        self.samples, self.answer_length = _random_samples(recipe, self.benchmark.vocabulary)
        self.longest = max(map(len, self.samples))
        self.methods = _methods(self.benchmark.plan, self.answer_length)
        self.passes: dict[str, dict[str, int]] = {name: {} for name in self.methods}
        self.weights_fit_gathered = False
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        """(method, activity) -> seconds by turn, each on the slowest rank."""

    def turn(self) -> None:
        """Draw and train on a round of every method, train an epoch of sft, and run `generate()`."""
        policy = self.benchmark.policy
        for name, method in self.methods.items():
            rows = self._draw(name, method, "gathered")
            self._train(name, rows)
            if policy.sharded:
                self._draw(name, method, "sharded")
        self._train("sft", self.samples)
        with policy.gathered(self.longest):
            self.weights_fit_gathered = not policy.sharded
            self._timed("generate", "generate", self._generate)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row of `bench.json` per method."""
        generate_rate, sft = self._rate("generate", "generate"), np.array(self.seconds["sft", "training"])
        rows = []
        for name in self.methods:
            drawing, training = (np.array(self.seconds[name, activity]) for activity in ("gathered", "training"))
            rates = {weights: self._rate(name, weights) for weights in ("gathered", "sharded")}
            rows.append(
                {
                    "draws": name,
                    "passes": self.passes[name],
                    "weights_fit_gathered": self.weights_fit_gathered,
                    "tokens_per_second": rates | {"generate": generate_rate},
                    "ratio_to_generate": {
                        weights: rate and generate_rate and rate / generate_rate for weights, rate in rates.items()
                    },
                    "seconds": {
                        activity: seconds for (method, activity), seconds in self.seconds.items() if method == name
                    }
                    | {"sft": sft.tolist()},
                    "drawing_share": float(np.median(drawing / (drawing + training))),
                    "epoch_time_ratio": float(np.median((drawing + training) / sft)),
                }
            )
        return rows

    def _draw(self, name: str, method: RoundMethod, weights: str) -> list[TrainingRow]:
        """Draw a round with `gathered` or `sharded` weights."""
        policy = self.benchmark.policy

        def draw() -> tuple[list[TrainingRow], dict[str, int]]:
            with policy.gathered(self.longest) if weights == "gathered" else nullcontext():
                return method.rows(self.samples, policy, 0)

        rows, counts = self._timed(name, weights, draw)
        self.passes[name][weights] = counts.get("passes", 0)
        return rows

    def _train(self, name: str, rows: Sequence[TrainingRow]) -> None:
        size = self.benchmark.plan.micro_batch_size

        def train(rows: Sequence[TrainingRow]) -> None:
            for first in range(0, len(rows), size):
                batch = collate([[row] for row in rows[first : first + size]])
                train_step(self.benchmark.engine, [batch], 0.0)

        train(rows[:size])  # so that the work before the epoch has no part in the epoch's time
        self._timed(name, "training", lambda: train(rows))

    @torch.no_grad()
    def _generate(self) -> None:
        """Answer all prompts in one batch by the `generate()` of transformers."""
        policy, answer = self.benchmark.policy, self.answer_length
        ids, mask = generation.padded([sample.prompt_ids.tolist() for sample in self.samples], policy.device)
        settings = GenerationConfig(
            max_new_tokens=answer, min_new_tokens=answer, do_sample=True, top_k=0, pad_token_id=0, use_cache=True
        )
        model = self.benchmark.engine.module
        model.generate(ids, attention_mask=mask, generation_config=settings, synced_gpus=policy.sharded)

    def _timed(self, name: str, activity: str, action: Callable[[], Any]) -> Any:
        dist.barrier()
        started = time.perf_counter()
        result = action()
        get_accelerator().synchronize()
        self.seconds[name, activity] += process_group.max_over_ranks([time.perf_counter() - started])
        return result

    def _rate(self, name: str, activity: str) -> float | None:
        """Return the answer tokens per second over all ranks; None if the activity was not timed."""
        if (name, activity) not in self.seconds:
            return None
        tokens = _ROWS * self.answer_length * dist.get_world_size()
        return tokens / float(np.median(self.seconds[name, activity]))


def _random_samples(recipe: Recipe, vocabulary: int) -> tuple[list[TrainingRow], int]:
    """Return this rank's rows of random tokens, and the length of their answers.

    Rows leave room for an answer of the model between the prompt and the reference, as `rac` needs.
    """
    length, rank = recipe.data.max_length, dist.get_rank()
    answer = 3 * length // 8
    random = np.random.default_rng((recipe.seed, rank))
    samples = []
    for i, prompt in enumerate(np.linspace(length // 8, length // 4, _ROWS).astype(int).tolist()):
        ids = random.integers(0, vocabulary, prompt + answer)
        turns = np.array([[prompt, prompt + answer - 1, prompt + answer]])
        samples.append(TrainingRow.reference(rank * _ROWS + i, ids, turns))
    return samples, answer


def _methods(plan: Plan, answer_length: int) -> dict[str, RoundMethod]:
    mixture: dict[str, Any] = {"replace_probability": _P, "schedule": "constant"}
    corrections = SelfgenConfig(method="rac", max_new_tokens=answer_length, sft_share=0.0)
    return {
        f"bash, p {_P:g}, 1 pass": Bash(SelfgenConfig(method="bash", passes=1, **mixture), plan),
        f"bash, p {_P:g}, exact": Bash(SelfgenConfig(method="bash", passes="exact", **mixture), plan),
        "rac, free-running": Rac(corrections, plan),
    }
