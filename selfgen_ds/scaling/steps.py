"""What a step with a self-generated-token pass costs beside one of `sft`.

The variants of a block take turns step by step on one engine, so that a noisy machine hits all alike; every one is
given the same rows. A step is the trainer's own. Bytes and memory are measured in steps of their own, which are not
timed: looking at them takes time.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from selfgen_ds.config import Recipe, SelfgenConfig
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.correction import Correction
from selfgen_ds.data.samples import Sample
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.engine.step import train_step
from selfgen_ds.methods.method import Method, Plan
from selfgen_ds.methods.scheduled_sampling import ScheduledSampling
from selfgen_ds.model import probe
from selfgen_ds.model.loading import model_config
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import raise_on_all_ranks
from selfgen_ds.scaling import report
from selfgen_ds.scaling.memory import PeakMemory
from selfgen_ds.setup.prepare import build_engine, engine_policy

_FOREVER = 1 << 30  # steps: the learning rate stays
_WARM_UP = 2  # turns that make optimizer states and fill caches


@dataclass(frozen=True, kw_only=True)
class Block:
    """Variants that take turns, each of them one to compare with the block's `sft`."""

    accumulation: int
    checkpointing: bool
    mixtures: tuple[tuple[float, int | Literal["exact"]], ...]
    """p and passes of scheduled sampling."""

    def of(self, recipe: Recipe) -> Recipe:
        """A recipe as the block has it."""
        train = replace(
            recipe.train,
            gradient_accumulation_steps=self.accumulation,
            activation_checkpointing=self.checkpointing,
        )
        return replace(recipe, train=train)


_PASSES: tuple[int | Literal["exact"], ...] = (1, 2, "exact")
_ALL = tuple((p, passes) for p in (0.1, 0.25, 0.5) for passes in _PASSES)
BUDGET = [
    Block(
        accumulation=1,
        checkpointing=True,
        mixtures=((0.0, 1), (0.1, 1), (0.25, 1), (0.5, 1), (0.25, 2), (0.25, "exact")),
    ),
    Block(accumulation=8, checkpointing=True, mixtures=((0.25, 1),)),
]
"""What the budget of a pass is about."""
FULL = [Block(accumulation=a, checkpointing=c, mixtures=_ALL) for c in (True, False) for a in (1, 8)]


class Engine:
    """The engine of a block and its variants."""

    def __init__(self, recipe: Recipe, json_config: dict[str, Any], block: Block) -> None:
        self.recipe = recipe = block.of(recipe)
        train = recipe.train
        self.block = block
        with raise_on_all_ranks():
            tokenizer = load_tokenizer(recipe.model)
            config = model_config(recipe.model, tokenizer)
            form = probe.check(recipe.model, config, packing=False)
        self.vocabulary = config.get_text_config(decoder=True).vocab_size
        self.memory = PeakMemory()
        with self.memory.making():
            quiet = json_config | {"tensorboard": {"enabled": False}}  # it would write in timed steps
            self.engine, self.hf_config = build_engine(recipe, quiet, config, form, tokenizer, _FOREVER)
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        self.policy = engine_policy(recipe, self.engine, end_tokens=[self.vocabulary])
        rows = train.micro_batch_size * block.accumulation * dist.get_world_size()
        self.plan = plan = Plan(
            seed=recipe.seed,
            total_steps=_FOREVER,
            step_size=rows,
            epoch_size=rows,
            micro_batch_size=train.micro_batch_size,
            max_length=recipe.data.max_length,
            tokenizer=tokenizer,
            correction=Correction(),
        )
        self.variants: dict[str, Method] = {"sft": Method(SelfgenConfig(method="sft"), plan)}
        self.mixtures = {f"p {p:g}, {passes}": (p, passes) for p, passes in block.mixtures}
        for name, (p, passes) in self.mixtures.items():
            its = replace(recipe.selfgen, replace_probability=p, passes=passes, schedule="constant")
            self.variants[name] = ScheduledSampling(its, plan)
        self.clock = _Clock(self.engine)
        self.invalidations = count_invalidations(self.engine)

    def step(self, method: Method, number: int) -> int:
        """One of the trainer's steps on the rows of a turn; the real tokens of all ranks."""
        window = random_window(self.recipe, self.vocabulary, number)
        dist.barrier()
        with self.clock.step():
            with self.clock.phase("pass"):
                mixed = method.contexts(window, self.policy, number)
            result = train_step(
                self.engine, mixed, self.recipe.optim.label_smoothing, method.config.drawn_context_weight
            )
        return result.tokens

    def measure(self, steps: int) -> list[dict[str, Any]]:
        """A row of `bench.json` for every variant."""
        times: dict[str, list[list[float]]] = {name: [] for name in self.variants}
        found: dict[str, dict[str, Any]] = {}
        total = len(self.variants) * (_WARM_UP + steps + 2)
        with tqdm(desc="bench", total=total, unit="step", leave=False, disable=dist.get_rank() != 0) as bar:
            for number in range(_WARM_UP + steps):
                for name, method in self.variants.items():
                    with self.memory.making() if number == 0 else nullcontext():  # the optimizer's states
                        tokens = self.step(method, number)
                    if number >= _WARM_UP:
                        times[name].append(self.clock.seconds())
                    bar.update()
                gc.collect()
            invalidations = len(self.invalidations)
            for name, method in self.variants.items():
                collectives = self._collectives(method)
                found[name] = {
                    "passes_made": method.passes,
                    "groups": self.policy.groups if method.passes else 0,
                    "collectives": collectives,
                    "gathered_bytes": _gathered(collectives),
                    "peak_memory_bytes": self._peak(method),
                }
                bar.update(2)
        self.engine.destroy()
        parameter_bytes = self.parameters * self.engine.module.dtype.itemsize
        return [
            {
                "variant": "scheduled_sampling" if name in self.mixtures else "sft",
                "replace_probability": self.mixtures.get(name, (0.0, 0))[0],
                "passes": self.mixtures.get(name, (0.0, 0))[1],
                "gradient_accumulation_steps": self.block.accumulation,
                "activation_checkpointing": self.block.checkpointing,
                **report.row(times[name], times["sft"]),
                **its,
                **report.ratios(its, found["sft"], parameter_bytes),
                **report.rates(times[name], tokens, self.parameters, dist.get_world_size(), report.peak_flops()),
                "trace_invalidations": invalidations,
            }
            for name, its in found.items()
        ]

    def _collectives(self, method: Method) -> dict[str, dict[str, int]]:
        """Calls in a step and the bytes that this rank sends in them, from DeepSpeed's communication log."""
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

    def _peak(self, method: Method) -> float:
        """Bytes of a step, on the rank that needs most."""
        return max_over_ranks([self.memory.during(lambda: self.step(method, 0))])[0]


def _gathered(collectives: dict[str, dict[str, int]]) -> int:
    """Bytes that a rank holds in the end of a step's gathers, of which its own part is sent (and logged).

    Gathers inside a node (`zero_hpz_partition_size`) count as if they were from all ranks: the log names no group.
    """
    sent = sum(entry["bytes"] for name, entry in collectives.items() if name.startswith("all_gather"))
    return sent * dist.get_world_size()


def random_window(recipe: Recipe, vocabulary: int, number: int) -> list[TokenBatch]:
    """The rows of a turn on this rank: random tokens, a quarter of them prompt. Costs depend on lengths alone."""
    train, length = recipe.train, recipe.data.max_length
    seed = (recipe.seed, number, dist.get_rank())
    ids = np.random.default_rng(seed).integers(
        0, vocabulary, (train.gradient_accumulation_steps, train.micro_batch_size, length)
    )
    turns = np.array([[length // 4, length - 1, length]])
    batches = []
    for micro, rows in enumerate(ids):
        first = (micro * dist.get_world_size() + dist.get_rank()) * len(rows)
        samples = [[Sample(sample_id=first + i, input_ids=row, turns=turns)] for i, row in enumerate(rows)]
        batches.append(collate(samples).to(process_group.device()))
    return batches


class _Clock:
    """Seconds of a step's phases. The engine's own calls are wrapped, so that the step is the trainer's."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._inside = False
        for name, phase in {"forward": "forward", "backward": "backward", "step": "optimizer"}.items():
            setattr(engine, name, self._timed(getattr(engine, name), phase))

    def _timed(self, call: Any, phase: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return call(*args, **kwargs)

        return timed

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside another phase it belongs to that one."""
        if self._inside:
            yield
            return
        self._inside = True
        started = time.perf_counter()
        yield
        get_accelerator().synchronize()
        self._spent[name] += time.perf_counter() - started
        self._inside = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step, from its start to its end on this rank."""
        self._spent.clear()
        started = time.perf_counter()
        yield
        get_accelerator().synchronize()
        self._total = time.perf_counter() - started

    def seconds(self) -> list[float]:
        """Of `report.PHASES` and of the whole step, each on the rank that took longest."""
        spent = [self._spent[name] for name in report.PHASES[:-1]]
        return max_over_ranks([*spent, self._total - sum(spent), self._total])


def max_over_ranks(values: Sequence[float]) -> list[float]:
    result = torch.tensor(values, dtype=torch.float64, device=process_group.device())
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return result.tolist()


def count_invalidations(engine: deepspeed.DeepSpeedEngine) -> list[None]:
    """A list that grows whenever ZeRO-3's recorded order of modules is thrown away."""
    seen: list[None] = []
    if engine.zero_optimization_stage() == 3:
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        invalidate = coordinator._invalidate_trace

        def counted() -> None:
            seen.append(None)
            invalidate()

        coordinator._invalidate_trace = counted
    return seen
