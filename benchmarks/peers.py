"""Our steps beside what a user would take instead, in one run: same rows, model and DeepSpeed JSON.

    pip install -e '.[peers]' -c constraints.txt
    deepspeed --num_accelerators 2 benchmarks/peers.py --config recipes/bench.yaml

Takes a recipe and its overrides as `bench` does, and writes `peers.json` into the output folder. The contenders take
turns step by step, each with a model and an engine of its own in the same processes:

- `sft`; `scheduled sampling`, one pass; `bash`, the exact mixture drawn with gathered weights, then trained on (they
  are gathered for every step's rows here, and once for a whole round in a run)
- `TRL sft`: SFTTrainer as it comes; `without metrics`: it computes the loss alone
- `TRL gkd`: GKDTrainer that answers every prompt itself (lmbda = 1), with a second model of the same weights as its
  teacher. With activation checkpointing it generates without a cache; `with cache`: told to use one
- `generate`: scheduled sampling as one would write it down: `generate()` that keeps to the reference where no token is
  replaced, then logits and loss, weights sharded all the time; `gathered`: gathered for `generate()` by DeepSpeed

No answer ends early: all generate, and train on, the same number of tokens.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import unwrap_model_for_generation
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from selfgen_ds.cli import recipe_of
from selfgen_ds.config import Recipe
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.engine import ds_config
from selfgen_ds.engine.step import train_step
from selfgen_ds.files import make_folder, write_atomically
from selfgen_ds.model.loading import model_config
from selfgen_ds.ranks import process_group
from selfgen_ds.scaling import report, steps
from selfgen_ds.scaling.memory import LiveTensors

WARM_UP, TURNS, P = 2, 12, 0.25
OWN = {"sft": "sft", "scheduled sampling": f"p {P:g}, 1", "bash": f"p {P:g}, exact"}
SLOW, EVERY = {"TRL gkd", "TRL gkd, with cache", "generate", "generate, gathered"}, 3  # they step in every third turn
MEASURED = {"sft", "scheduled sampling", "TRL sft", "TRL sft, without metrics"}  # their memory

Loop = Callable[[Callable[[], None]], object]
"""Builds its model, then calls what it is given before every step."""


class Turns:
    """A loop in a thread of its own, held before every step until it is its turn.

    What it does between two steps, such as making the next batch, counts as part of the one before.

    Args:
        measured: Whether its `peak` will be asked for.
    """

    def __init__(self, loop: Loop, measured: bool) -> None:
        self._go, self._held = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        # a CPU has no allocator to ask
        self._tensors = LiveTensors() if get_accelerator().device_name() == "cpu" else None
        self._watched = measured
        gc.collect()
        before = self._allocated()
        threading.Thread(target=self._body, args=(loop,), daemon=True).start()
        self._wait()
        self.step(watched=measured)  # makes the optimizer's states
        gc.collect()
        self._states = self._allocated() - before

    def step(self, watched: bool = False) -> None:
        """One step.

        Args:
            watched: Follow its tensors, on a CPU, which takes time.
        """
        self._watched = watched
        self._go.release()
        self._wait()

    def peak(self) -> int:
        """Bytes of a step: model and optimizer states, and the most that it makes beside them."""
        gc.collect()
        before = self._allocated()
        if self._tensors is not None:
            self._tensors.reset()
        else:
            get_accelerator().reset_peak_memory_stats()
        self.step(watched=True)
        most = self._tensors.peak if self._tensors is not None else get_accelerator().max_memory_allocated()
        return self._states + most - before

    def _allocated(self) -> int:
        return self._tensors.live if self._tensors is not None else get_accelerator().memory_allocated()

    def _body(self, loop: Loop) -> None:
        get_accelerator().set_device(process_group.local_rank())  # a thread begins with the first one
        try:
            self._watch(True)
            loop(self._hold)
        except BaseException as error:
            self._error = error
        self._held.release()

    def _hold(self) -> None:
        self._watch(False)
        self._held.release()
        self._go.acquire()
        self._watch(True)

    def _watch(self, enter: bool) -> None:
        if self._watched and self._tensors is not None:
            self._tensors.__enter__() if enter else self._tensors.__exit__(None, None, None)

    def _wait(self) -> None:
        self._held.acquire()
        if self._error is not None:
            raise self._error


class Hold(TrainerCallback):
    def __init__(self, hold: Callable[[], None]) -> None:
        self.hold = hold

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.hold()


class KeepReference(LogitsProcessor):
    """Leaves the reference's token alone possible where none is drawn: what is generated is an exact mixture.

    Args:
        target: `[rows, length]` int64.
        drawn: `[rows, length]` bool.
    """

    def __init__(self, target: Tensor, drawn: Tensor) -> None:
        self.target, self.drawn = target, drawn

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1]
        kept = torch.full_like(scores, -torch.inf).scatter_(1, self.target[:, place, None], 0.0)
        return torch.where(self.drawn[:, place, None], scores, kept)


class Peers:
    """The contenders' loops."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer = load_tokenizer(recipe.model)
        self.config = model_config(recipe.model, self.tokenizer)
        self.json = ds_config.read(recipe.deepspeed)
        self.steps = 1 + WARM_UP + TURNS + 1 + 1  # the last one ends the training
        self.prompt = recipe.data.max_length // 4
        self.passes: dict[str, int] = {}
        mine = torch.stack([self.window(number)[0].target for number in range(self.steps)])
        everyone: list[Tensor] = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine.cpu())
        # as the trainers' loaders take them: a batch for every rank, step by step
        self.rows = torch.stack(everyone, dim=1).flatten(0, 2)

    def window(self, number: int) -> list[TokenBatch]:
        return steps.random_window(self.recipe, self.config.get_text_config(decoder=True).vocab_size, number)

    def loops(self, folder: str) -> dict[str, Loop]:
        return {
            "sft": lambda hold: self.own(hold, "sft"),
            "TRL sft": lambda hold: self.trl_sft(hold, folder, metrics=True),
            "TRL sft, without metrics": lambda hold: self.trl_sft(hold, folder, metrics=False),
            "scheduled sampling": lambda hold: self.own(hold, "scheduled sampling"),
            "bash": lambda hold: self.own(hold, "bash"),
            "TRL gkd": lambda hold: self.trl_gkd(hold, folder, cache=False),
            "TRL gkd, with cache": lambda hold: self.trl_gkd(hold, folder, cache=True),
            "generate": lambda hold: self.generate(hold, gathered=False),
            "generate, gathered": lambda hold: self.generate(hold, gathered=True),
        }

    def own(self, hold: Callable[[], None], name: str) -> None:
        unset_hf_deepspeed_config()  # with another contender's, the plain models that a form is read off are sharded
        block = steps.Block(accumulation=1, checkpointing=True, mixtures=((P, 1), (P, "exact")))
        ours = steps.Engine(self.recipe, self.json, block)
        method, length = ours.variants[OWN[name]], self.recipe.data.max_length
        for number in count():
            hold()
            with ours.policy.gathered(length) if name == "bash" else nullcontext():
                mixed = method.contexts(self.window(number), ours.policy, number)
            self.passes[name] = method.passes
            train_step(ours.engine, mixed, 0.0)

    def trl_sft(self, hold: Callable[[], None], folder: str, metrics: bool) -> None:
        from trl import SFTConfig, SFTTrainer  # an extra
        from trl.trainer.utils import add_fused_lm_head

        class LossAlone(SFTTrainer):
            def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any, **_: Any) -> Tensor:
                outputs = model(**inputs, use_cache=False, fused_lm_head=True)
                return -outputs.log_probs.sum() / num_items_in_batch * dist.get_world_size()

        arguments = self.arguments(SFTConfig, folder)
        labels = self.rows.clone()
        labels[:, : self.prompt] = -100
        trainer = (SFTTrainer if metrics else LossAlone)(
            self.model(),
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"input_ids": self.rows.tolist(), "labels": labels.tolist()}),
            processing_class=self.tokenizer,
            callbacks=[Hold(hold)],
        )
        if not metrics:
            add_fused_lm_head(trainer.model)
        trainer.train()

    def trl_gkd(self, hold: Callable[[], None], folder: str, cache: bool) -> None:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
            ids = torch.tensor([row["input_ids"] for row in rows])
            labels = ids.clone()
            labels[:, : self.prompt] = -100
            mask, prompts = torch.ones_like(ids), ids[:, : self.prompt]
            return {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": labels,
                "prompts": prompts,
                "prompt_attention_mask": torch.ones_like(prompts),
            }

        answer = self.recipe.data.max_length - self.prompt
        arguments = self.arguments(GKDConfig, folder, lmbda=1.0, temperature=1.0, max_new_tokens=answer)
        trainer = GKDTrainer(
            self.model(),
            teacher_model=self.model(),
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"input_ids": self.rows.tolist()}),
            data_collator=collate,
            processing_class=self.tokenizer,
            callbacks=[Hold(hold)],
        )
        trainer.generation_config.use_cache, trainer.generation_config.min_new_tokens = cache, answer
        trainer.train()

    def arguments(self, kind: Any, folder: str, **more: Any) -> Any:
        """Of a trainer; while they live, models are built sharded."""
        return kind(
            output_dir=folder,
            deepspeed=copy.deepcopy(self.json),
            per_device_train_batch_size=self.recipe.train.micro_batch_size,
            gradient_checkpointing=True,
            max_steps=self.steps,
            max_length=self.recipe.data.max_length,
            train_sampling_strategy="sequential",
            use_cpu=get_accelerator().device_name() == "cpu",
            bf16=self.recipe.model.dtype == "bfloat16",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            **more,
        )

    def model(self) -> PreTrainedModel:
        set_seed(self.recipe.seed)
        return AutoModelForCausalLM.from_config(self.config, dtype=getattr(torch, self.recipe.model.dtype))

    def generate(self, hold: Callable[[], None], gathered: bool) -> None:
        filled = ds_config.resolve(self.recipe, self.json, dist.get_world_size(), self.config.hidden_size)
        model = self.model()
        model.activation_checkpointing_enable()
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=copy.deepcopy(filled.config)
        )
        answer = self.recipe.data.max_length - self.prompt
        settings = GenerationConfig(
            max_new_tokens=answer, min_new_tokens=answer, do_sample=True, top_k=0, pad_token_id=0, use_cache=True
        )
        for number in count():
            hold()
            [batch] = self.window(number)
            drawn = (torch.rand(batch.target.shape, device=batch.target.device) < P) & batch.replaceable
            model.eval()  # with activation checkpointing and a cache it would generate wrong tokens
            with torch.no_grad(), unwrap_model_for_generation(engine) if gathered else nullcontext():
                context = model.generate(
                    batch.target[:, : self.prompt],
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([KeepReference(batch.target, drawn)]),
                    synced_gpus=not gathered,
                )
            model.train()
            logits = engine(input_ids=context, use_cache=False).logits[:, self.prompt - 1 : -1]
            engine.backward(F.cross_entropy(logits.float().flatten(0, 1), batch.target[:, self.prompt :].flatten()))
            engine.step()


def main() -> None:
    recipe, _ = recipe_of(sys.argv[1:])
    train = replace(recipe.train, gradient_accumulation_steps=1, activation_checkpointing=True)
    recipe = replace(recipe, train=train)
    make_folder(Path(recipe.output_dir), "output_dir")
    process_group.init_process_group()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Peers(recipe), folder)
    if dist.get_rank() == 0:
        settings = {"p": P, "turns": TURNS, "recipe": asdict(recipe), "deepspeed": ds_config.read(recipe.deepspeed)}
        record: dict[str, Any] = {"environment": report.environment(), **settings, "rows": rows}
        record["environment"]["versions"] |= {name: version(name) for name in ("trl", "accelerate")}
        write_atomically(Path(recipe.output_dir) / "peers.json", json.dumps(record, indent=1) + "\n")
        show(rows)
    dist.barrier()
    process_group.leave_process_group()


def measure(peers: Peers, folder: str) -> list[dict[str, Any]]:
    """A row for every contender."""
    turns = {name: Turns(loop, name in MEASURED) for name, loop in peers.loops(folder).items()}
    times: dict[str, dict[int, float]] = {name: {} for name in turns}
    for number in range(-WARM_UP, TURNS):
        for name, contender in turns.items():
            if name in SLOW and number % EVERY:
                continue
            synchronize()
            started = time.perf_counter()
            contender.step()
            synchronize()
            if number >= 0:
                times[name][number] = time.perf_counter() - started
    rows = [summary(name, its, times["sft"], peers.rows.numel() // peers.steps) for name, its in times.items()]
    for row in rows:
        name = row["contender"]
        if name in OWN:
            row["passes"] = peers.passes[name]
        if name in MEASURED:
            row["peak_memory_bytes"] = largest(turns[name].peak())
            row["peak_memory_ratio"] = row["peak_memory_bytes"] / rows[0]["peak_memory_bytes"]
    return rows


def summary(name: str, times: dict[int, float], sft: dict[int, float], tokens: int) -> dict[str, Any]:
    """Medians and quartiles over turns; of the ratio, to sft's step in the same turn.

    Args:
        times: Seconds by turn.
        tokens: Of a step, over all ranks.
    """
    low, ratio, high = np.percentile([seconds / sft[turn] for turn, seconds in times.items()], [25, 50, 75])
    quartiles = np.percentile(list(times.values()), [25, 50, 75])
    return {
        "contender": name,
        "steps": len(times),
        "step_time_s": quartiles.tolist(),
        "step_time_ratio": float(ratio),
        "step_time_ratio_quartiles": [float(low), float(high)],
        "tokens_per_second": float(tokens / quartiles[1]),
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "time", "quartiles", "memory", "steps", "step ms", "tokens/s"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row["contender"],
            f"{row['step_time_ratio']:.3f}",
            " ".join(f"{ratio:.3f}" for ratio in row["step_time_ratio_quartiles"]),
            f"{row['peak_memory_ratio']:.3f}" if "peak_memory_ratio" in row else "",
            str(row["steps"]),
            f"{1e3 * row['step_time_s'][1]:.0f}",
            f"{row['tokens_per_second']:.0f}",
        )
    console = Console(highlight=False, width=120)
    console.print(table)
    console.print("time and memory: through sft's")


def synchronize() -> None:
    """Wait until all ranks are done."""
    get_accelerator().synchronize()
    dist.barrier()


def largest(value: int) -> int:
    """Of the ranks' values."""
    result = torch.tensor(value, device=process_group.device())
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return int(result)


if __name__ == "__main__":
    main()
