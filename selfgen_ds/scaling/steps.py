"""Measure the cost of an optimizer step with a self-generated-token pass, compared with a step of sft.

The variants of a block take turns step by step on one engine, on the same rows, so that other load on the machine
slows all of them alike. A step is the trainer's own code. Bytes and memory are measured in steps that are not timed,
because the measurement takes time.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import deepspeed
import numpy as np
import torch.distributed as dist

from selfgen_ds.config import Recipe, SelfgenConfig
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.correction import Correction
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.engine.step import train_step
from selfgen_ds.methods.method import Method, Plan
from selfgen_ds.methods.scheduled_sampling import ScheduledSampling
from selfgen_ds.model import probe
from selfgen_ds.model.loading import model_config
from selfgen_ds.progress import bar
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import raise_on_all_ranks
from selfgen_ds.scaling import statistics
from selfgen_ds.scaling.clock import StepClock
from selfgen_ds.scaling.environment import peak_flops
from selfgen_ds.scaling.memory import PeakMemory
from selfgen_ds.setup.build import build_engine, engine_policy

_TOTAL_STEPS = 1 << 30  # so many that the learning rate does not change
_WARM_UP = 2  # turns that create the optimizer's states and fill caches

Passes = int | Literal["exact"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Variants that take turns on one engine, and are compared with the block's `sft`."""

    accumulation: int
    checkpointing: bool
    mixtures: tuple[tuple[float, Passes], ...]
    """Replacement probability and passes of each variant of scheduled sampling."""

    def of(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the block's accumulation and activation checkpointing."""
        train = replace(
            recipe.train,
            rows_per_step=None,
            micro_batch_size=recipe.train.shape(process_group.world_size()).micro_batch_size,
            gradient_accumulation_steps=self.accumulation,
            activation_checkpointing=self.checkpointing,
        )
        return replace(recipe, train=train)


_PASSES: tuple[Passes, ...] = (1, 2, "exact")
_ALL = tuple((p, passes) for p in (0.1, 0.25, 0.5) for passes in _PASSES)
BUDGET = [
    Block(
        accumulation=1,
        checkpointing=True,
        mixtures=((0.0, 1), (0.1, 1), (0.25, 1), (0.5, 1), (0.25, 2), (0.25, "exact")),
    ),
    Block(accumulation=8, checkpointing=True, mixtures=((0.25, 1),)),
]
"""The blocks that measure whether a pass stays within its budget."""
FULL = [Block(accumulation=a, checkpointing=c, mixtures=_ALL) for c in (True, False) for a in (1, 8)]


class BlockBenchmark:
    """The engine of a block, its variants, and their measurement.

    Collective: every rank must construct and call this, because the ranks train together.
    """

    def __init__(self, recipe: Recipe, json_config: dict[str, Any], block: Block) -> None:
        self.block = block
        self.recipe = recipe = block.of(recipe)
        with raise_on_all_ranks():
            tokenizer = load_tokenizer(recipe.model)
            config = model_config(recipe.model, tokenizer)
            traits = probe.check(recipe.model, config, packing=False)
        self.vocabulary = config.get_text_config(decoder=True).vocab_size
        self.memory = PeakMemory()
        with self.memory.counting():
            quiet = json_config | {"tensorboard": {"enabled": False}}  # it would write in timed steps
            # Transformers learns from `hf_config`, through a weak reference, that the model is sharded.
            self.engine, self.hf_config = build_engine(recipe, quiet, config, traits, tokenizer, _TOTAL_STEPS)
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        self.policy = engine_policy(recipe, self.engine, end_tokens=[self.vocabulary])
        shape = recipe.train.shape(dist.get_world_size())
        self.plan = Plan(
            seed=recipe.seed,
            total_steps=_TOTAL_STEPS,
            step_size=shape.rows,
            epoch_size=shape.rows,
            micro_batch_size=shape.micro_batch_size,
            max_length=recipe.data.max_length,
            tokenizer=tokenizer,
            correction=Correction(),
        )
        self.variants: dict[str, Method] = {"sft": Method(SelfgenConfig(method="sft"), self.plan)}
        self.mixtures = {f"p {p:g}, {passes}": (p, passes) for p, passes in block.mixtures}
        for name, (p, passes) in self.mixtures.items():
            selfgen = replace(recipe.selfgen, replace_probability=p, passes=passes, schedule="constant")
            self.variants[name] = ScheduledSampling(selfgen, self.plan)
        self.clock = StepClock(self.engine)
        self.invalidations = count_invalidations(self.engine)

    def step(self, method: Method, turn: int) -> int:
        """Run one of the trainer's steps on the rows of a turn, and return the tokens of all ranks."""
        batches = random_batches(self.recipe, self.vocabulary, turn)
        dist.barrier()
        with self.clock.step():
            with self.clock.phase("pass"):
                batches = method.contexts(batches, self.policy, turn)
            result = train_step(
                self.engine, batches, self.recipe.optim.label_smoothing, method.config.drawn_context_weight
            )
        return result.tokens

    def measure(self, steps: int) -> list[dict[str, Any]]:
        """Return a row of `bench.json` per variant, and destroy the engine.

        Args:
            steps: Timed steps of every variant.
        """
        times: dict[str, list[list[float]]] = {name: [] for name in self.variants}
        costs: dict[str, dict[str, Any]] = {}
        total = len(self.variants) * (_WARM_UP + steps + 2)
        with bar("bench", "step", total=total, leave=False, disable=dist.get_rank() != 0) as progress:
            for turn in range(_WARM_UP + steps):
                for name, method in self.variants.items():
                    # The first step creates the optimizer's states.
                    with self.memory.counting() if turn == 0 else nullcontext():
                        tokens = self.step(method, turn)
                    if turn >= _WARM_UP:
                        times[name].append(self.clock.seconds())
                    progress.update()
                gc.collect()
            invalidations = len(self.invalidations)
            for name, method in self.variants.items():
                costs[name] = self._costs(method)
                progress.update(2)
        self.engine.destroy()
        return [self._row(name, times, costs, tokens) | {"trace_invalidations": invalidations} for name in costs]

    def _costs(self, method: Method) -> dict[str, Any]:
        """Return the passes, the collectives, and the peak memory of a step, from two steps that are not timed."""
        collectives = self._collectives(method)
        # The log counts the part of a gather that the rank sends: the result divided by the number of ranks. A gather
        # inside a node (`zero_hpz_partition_size`) counts as if it were over all ranks, because the log names no group.
        sent = sum(entry["bytes"] for name, entry in collectives.items() if name.startswith("all_gather"))
        return {
            "passes_made": method.passes,
            "groups": self.policy.groups if method.passes else 0,
            "collectives": collectives,
            "gathered_bytes": sent * dist.get_world_size(),
            "peak_memory_bytes": process_group.max_over_ranks([self.memory.during(lambda: self.step(method, 0))])[0],
        }

    def _collectives(self, method: Method) -> dict[str, dict[str, int]]:
        """Return the calls of a step's collectives and the bytes that this rank sends, from DeepSpeed's log of them."""
        deepspeed.comm.configure(enabled=True, prof_all=True)
        deepspeed.comm.reset_log()
        self.step(method, 0)
        deepspeed.comm.configure(enabled=False)
        return {
            operation: {
                "calls": sum(entry[0] for entry in sizes.values()),
                "bytes": sum(size * entry[0] for size, entry in sizes.items()),
            }
            for operation, sizes in deepspeed.comm.comm.comms_logger.comms_dict.items()
        }

    def _row(
        self, name: str, times: dict[str, list[list[float]]], costs: dict[str, dict[str, Any]], tokens: int
    ) -> dict[str, Any]:
        p, passes = self.mixtures.get(name, (0.0, 0))
        parameter_bytes = self.parameters * self.engine.module.dtype.itemsize
        return {
            "variant": "scheduled_sampling" if name in self.mixtures else "sft",
            "replace_probability": p,
            "passes": passes,
            "gradient_accumulation_steps": self.block.accumulation,
            "activation_checkpointing": self.block.checkpointing,
            **statistics.step_times(times[name], times["sft"]),
            **costs[name],
            **statistics.memory_and_collectives(costs[name], costs["sft"], parameter_bytes),
            **statistics.rates(times[name], tokens, self.parameters, dist.get_world_size(), peak_flops()),
        }


def random_batches(recipe: Recipe, vocabulary: int, turn: int) -> list[TokenBatch]:
    """Return this rank's micro-batches of a turn: rows of random tokens, the first quarter of each a prompt.

    Random tokens will do, because the cost of a step depends on the lengths alone.
    """
    shape, length = recipe.train.shape(dist.get_world_size()), recipe.data.max_length
    ids = np.random.default_rng((recipe.seed, turn, dist.get_rank())).integers(
        0, vocabulary, (shape.accumulation, shape.micro_batch_size, length)
    )
    turns = np.array([[length // 4, length - 1, length]])
    batches = []
    for number, rows in enumerate(ids):
        first = (number * dist.get_world_size() + dist.get_rank()) * len(rows)
        samples = [[TrainingRow.reference(first + i, row, turns)] for i, row in enumerate(rows)]
        batches.append(collate(samples))
    return batches


def count_invalidations(engine: deepspeed.DeepSpeedEngine) -> list[None]:
    """Return a list that grows by one entry whenever ZeRO-3 discards its recorded order of modules."""
    invalidations: list[None] = []
    if engine.zero_optimization_stage() == 3:
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        invalidate = coordinator._invalidate_trace

        def counted() -> None:
            invalidations.append(None)
            invalidate()

        coordinator._invalidate_trace = counted
    return invalidations
