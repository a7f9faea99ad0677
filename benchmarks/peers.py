"""Our steps beside what a user would take instead, step by step in turn: same rows, model and DeepSpeed JSON.

    pip install -e '.[peers]' -c constraints.txt
    deepspeed --num_accelerators 2 benchmarks/peers.py --config recipes/bench.yaml

Takes a recipe and its overrides as `bench` does. Every contender has a model and an engine of its own in one process:

- `sft`, `scheduled_sampling` (one pass), `bash` (the exact mixture of the window drawn beforehand, as a round of one
  epoch does for every row): ours
- `TRL sft`: SFTTrainer
- `TRL gkd`: GKDTrainer with lmbda = 1 and the student's weights as its teacher: on-policy answers in every step
- `generate`: scheduled sampling as one would write it down: `generate()` an answer, mix it in, logits, loss
"""

from __future__ import annotations

import copy
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import datasets
import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from selfgen_ds.config import Recipe
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.engine import ds_config, launch
from selfgen_ds.engine.model import model_config
from selfgen_ds.engine.trainer import train_step
from selfgen_ds.scaling import bench
from selfgen_ds.scaling.live_tensors import LiveTensors

STEPS, WARM_UP, P = 6, 2, 0.25


class Turns:
    """A loop that is not ours, in a thread of its own, held at the start of every step until it is its turn.

    What a trainer does between two steps, such as loading the next batch, counts as part of the one before.
    """

    def __init__(self, loop: Callable[[Callable[[], None]], object]) -> None:
        self._go, self._held = threading.Semaphore(0), threading.Semaphore(0)
        self.tensors: LiveTensors | None = None
        self._error: BaseException | None = None

        def body() -> None:
            try:
                loop(self._hold)
            except BaseException as error:
                self._error = error
            self._held.release()

        threading.Thread(target=body, daemon=True).start()
        self._wait()

    def _hold(self) -> None:
        if self.tensors is not None:
            self.tensors.__exit__(None, None, None)
        self._held.release()
        self._go.acquire()
        if self.tensors is not None:
            self.tensors.__enter__()

    def __call__(self, number: int) -> None:
        """One step."""
        self._go.release()
        self._wait()

    def _wait(self) -> None:
        self._held.acquire()
        if self._error is not None:
            raise self._error


class _Hold(TrainerCallback):
    def __init__(self, hold: Callable[[], None]) -> None:
        self.hold = hold

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.hold()


class Contenders:
    """All of them, each with the same model and rows."""

    def __init__(self, recipe: Recipe, folder: str) -> None:
        self.recipe, self.folder = recipe, folder
        self.tokenizer = load_tokenizer(recipe.model)
        self.config = model_config(recipe.model, self.tokenizer)
        self.json = ds_config.read(recipe.deepspeed)
        self.ours = bench.Engine(
            recipe, self.json, bench.Block(accumulation=1, checkpointing=True, mixtures=((P, 1), (P, "exact")))
        )
        self.tokens = 0
        self.drawn: dict[int, list[TokenBatch]] = {}
        self.steps: dict[str, Callable[[int], object]] = {
            "sft": lambda number: self._own("sft", number),
            "TRL sft": Turns(self._trl_sft),
            "scheduled_sampling": lambda number: self._own(f"p {P:g}, 1", number),
            "bash": self._bash,
            "TRL gkd": Turns(self._trl_gkd),
            "generate": Turns(self._generate),
        }

    def _own(self, variant: str, number: int) -> None:
        self.tokens = self.ours.step(self.ours.variants[variant], number)

    def _bash(self, number: int) -> None:
        """Draws with the weights gathered, as a round does, and trains on it."""
        ours = self.ours
        window = ours.window(number)
        with ours.policy.gathered(self.recipe.data.max_length):
            mixed = ours.variants[f"p {P:g}, exact"].contexts(window, ours.policy, number)
        train_step(ours.engine, mixed, 0.0)

    def _arguments(self, kind: type[SFTConfig], **more: Any) -> SFTConfig:
        train = self.recipe.train
        return kind(
            output_dir=self.folder,
            deepspeed=copy.deepcopy(self.json),
            per_device_train_batch_size=train.micro_batch_size,
            gradient_checkpointing=True,
            max_steps=STEPS + WARM_UP + 4,
            max_length=self.recipe.data.max_length,
            use_cpu=not torch.cuda.is_available(),
            bf16=self.recipe.model.dtype == "bfloat16",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            **more,
        )

    def _model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(self.config, dtype=getattr(torch, self.recipe.model.dtype))

    def _rows(self) -> datasets.Dataset:
        windows = [self.ours.window(number)[0].target for number in range(STEPS + WARM_UP + 4)]
        return datasets.Dataset.from_dict({"input_ids": torch.cat(windows).tolist()})

    def _collate(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        prompt = ids.shape[1] // 4
        labels = ids.clone()
        labels[:, :prompt] = -100
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "prompts": ids[:, :prompt],
            "prompt_attention_mask": torch.ones_like(ids[:, :prompt]),
        }

    def _trl_sft(self, hold: Callable[[], None]) -> None:
        arguments = self._arguments(SFTConfig)

        def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            return {name: value for name, value in self._collate(rows).items() if not name.startswith("prompt")}

        SFTTrainer(
            self._model(),
            args=arguments,
            train_dataset=self._rows(),
            data_collator=collate,
            processing_class=self.tokenizer,
            callbacks=[_Hold(hold)],
        ).train()

    def _trl_gkd(self, hold: Callable[[], None]) -> None:
        length = self.recipe.data.max_length
        arguments = self._arguments(GKDConfig, lmbda=1.0, temperature=1.0, max_new_tokens=length - length // 4)
        model = self._model()
        model.generation_config.eos_token_id = None  # every answer has the reference's length
        GKDTrainer(
            model,
            teacher_model=self._model(),
            args=arguments,
            train_dataset=self._rows(),
            data_collator=self._collate,
            processing_class=self.tokenizer,
            callbacks=[_Hold(hold)],
        ).train()

    def _generate(self, hold: Callable[[], None]) -> None:
        """As one would write it down: an answer by `generate()`, some of its tokens mixed in, logits, loss."""
        filled = ds_config.resolve(self.recipe, self.json, dist.get_world_size(), self.config.hidden_size)
        model = self._model()
        model.gradient_checkpointing_enable()
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=copy.deepcopy(filled.config)
        )
        for number in range(STEPS + WARM_UP + 4):
            hold()
            [batch] = self.ours.window(number)
            prompt = batch.target.shape[1] // 4
            answer = batch.target.shape[1] - prompt
            settings = GenerationConfig(
                max_new_tokens=answer, min_new_tokens=answer, do_sample=True, top_k=0, pad_token_id=0, use_cache=True
            )
            model.eval()
            with torch.no_grad():
                own = engine.module.generate(batch.target[:, :prompt], generation_config=settings, synced_gpus=True)
            model.train()
            chosen = (torch.rand(batch.target.shape, device=own.device) < P) & batch.replaceable
            context = torch.where(chosen, own, batch.target)
            logits = engine(input_ids=context, use_cache=False).logits[:, prompt - 1 : -1]
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch.target[:, prompt:].flatten())
            engine.backward(loss)
            engine.step()


def main() -> None:
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recipe)
    options = parser.instantiate(parser.parse_args([a for a in sys.argv[1:] if not a.startswith("--local_rank")]))
    recipe = Recipe(**{name: value for name, value in vars(options).items() if name != "config"})
    train = replace(recipe.train, gradient_accumulation_steps=1, activation_checkpointing=True)
    recipe = replace(recipe, train=train)
    launch.init_process_group()
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(recipe, folder)
        times: dict[str, list[float]] = {name: [] for name in contenders.steps}
        for number in range(WARM_UP + STEPS):
            for name, step in contenders.steps.items():
                dist.barrier()
                started = time.perf_counter()
                step(number)
                dist.barrier()
                if number >= WARM_UP:
                    times[name].append(time.perf_counter() - started)
        peaks = {name: _peak(contenders, name) for name in ("sft", "TRL sft")} if not torch.cuda.is_available() else {}
        if dist.get_rank() == 0:
            base = np.array(times["sft"])
            for name, values in times.items():
                low, ratio, high = np.percentile(np.array(values) / base, [25, 50, 75])
                rate = contenders.tokens / np.median(values)
                print(f"{name:20} {ratio:6.3f} x sft's step [{low:.3f}, {high:.3f}], {rate:8.0f} tokens/s")
            for name, peak in peaks.items():
                print(f"{name:20} {peak / 1e6:8.1f} MB allocated at once in a step, {peak / peaks['sft']:.3f} x sft")
        dist.barrier()
    launch.leave_process_group()


def _peak(contenders: Contenders, name: str) -> int:
    """The largest sum of tensors that a step makes; the states of model and optimizer are as large for all."""
    tensors = LiveTensors()
    step = contenders.steps[name]
    if isinstance(step, Turns):
        step.tensors = tensors  # entered in the loop's own thread
    with nullcontext() if isinstance(step, Turns) else tensors:
        step(WARM_UP + STEPS)
    return tensors.peak


if __name__ == "__main__":
    main()
