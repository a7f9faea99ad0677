"""The training loops that `benchmarks/peers.py` compares: ours, TRL's, and one written around `generate()`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from typing import Any

import datasets
import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import unwrap_model_for_generation
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
from turns import Loop

from selfgen_ds.config import Recipe
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.engine import ds_config
from selfgen_ds.engine.step import train_step
from selfgen_ds.model.loading import model_config
from selfgen_ds.ranks import process_group
from selfgen_ds.scaling.steps import Block, BlockBenchmark, random_batches

P = 0.25
OURS = {"sft": "sft", "scheduled sampling": f"p {P:g}, 1", "bash": f"p {P:g}, exact"}
"""Our contenders -> the variant of `selfgen_ds.scaling.steps` that each one is."""


class Hold(TrainerCallback):
    """Holds a transformers trainer before every step."""

    def __init__(self, hold: Callable[[], None]) -> None:
        self.hold = hold

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.hold()


class KeepReference(LogitsProcessor):
    """Forces the reference's token at every position that is not drawn, so that `generate()` draws an exact mixture.

    Args:
        target: The reference, `[rows, length]` int64.
        drawn: The positions to draw, `[rows, length]` bool.
    """

    def __init__(self, target: Tensor, drawn: Tensor) -> None:
        self.target, self.drawn = target, drawn

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1]
        forced = torch.full_like(scores, -torch.inf).scatter_(1, self.target[:, position, None], 0.0)
        return torch.where(self.drawn[:, position, None], scores, forced)


class Contenders:
    """The contenders' loops, which train on the same rows.

    Args:
        steps: Steps of every loop, the one that ends the training included.
    """

    def __init__(self, recipe: Recipe, steps: int) -> None:
        self.recipe = recipe
        self.tokenizer = load_tokenizer(recipe.model)
        self.config = model_config(recipe.model, self.tokenizer)
        self.json = ds_config.read(recipe.deepspeed)
        self.steps = steps
        self.prompt = recipe.data.max_length // 4
        self.passes: dict[str, int] = {}
        rows = torch.stack([self.batches(step)[0].target_ids for step in range(steps)]).cpu()
        # in the order of the trainers' data loaders: step by step, a batch per rank
        self.rows = torch.stack(process_group.all_gather_object(rows), dim=1).flatten(0, 2)

    def batches(self, step: int) -> list[TokenBatch]:
        return random_batches(self.recipe, self.config.get_text_config(decoder=True).vocab_size, step)

    def loops(self, folder: str) -> dict[str, Loop]:
        """Return every contender's loop; TRL's trainers write to `folder`."""
        return {
            "sft": lambda hold: self.ours(hold, "sft"),
            "TRL sft": lambda hold: self.trl_sft(hold, folder, metrics=True),
            "TRL sft, without metrics": lambda hold: self.trl_sft(hold, folder, metrics=False),
            "scheduled sampling": lambda hold: self.ours(hold, "scheduled sampling"),
            "bash": lambda hold: self.ours(hold, "bash"),
            "TRL gkd": lambda hold: self.trl_gkd(hold, folder, cache=False),
            "TRL gkd, with cache": lambda hold: self.trl_gkd(hold, folder, cache=True),
            "generate": lambda hold: self.generate(hold, gathered=False),
            "generate, gathered": lambda hold: self.generate(hold, gathered=True),
        }

    def ours(self, hold: Callable[[], None], name: str) -> None:
        # the probe of the model builds plain models, which another contender's DeepSpeed configuration would shard
        unset_hf_deepspeed_config()
        block = Block(accumulation=1, checkpointing=True, mixtures=((P, 1), (P, "exact")))
        benchmark = BlockBenchmark(self.recipe, self.json, block)
        method, length = benchmark.variants[OURS[name]], self.recipe.data.max_length
        for step in count():
            hold()
            with benchmark.policy.gathered(length) if name == "bash" else nullcontext():
                batches = method.contexts(self.batches(step), benchmark.policy, step)
            self.passes[name] = method.passes
            train_step(benchmark.engine, batches, 0.0)

    def trl_sft(self, hold: Callable[[], None], folder: str, metrics: bool) -> None:
        from trl import SFTConfig, SFTTrainer  # only installed with the extra `peers`
        from trl.trainer.utils import add_fused_lm_head

        class LossOnly(SFTTrainer):
            def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any, **_: Any) -> Tensor:
                outputs = model(**inputs, use_cache=False, fused_lm_head=True)
                return -outputs.log_probs.sum() / num_items_in_batch * dist.get_world_size()

        arguments = self.arguments(SFTConfig, folder)
        labels = self.rows.clone()
        labels[:, : self.prompt] = -100
        trainer = (SFTTrainer if metrics else LossOnly)(
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
        """Return a trainer's arguments; as long as they exist, models are built sharded."""
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
        for step in count():
            hold()
            [batch] = self.batches(step)
            drawn = (torch.rand(batch.target_ids.shape, device=batch.target_ids.device) < P) & batch.replaceable_mask
            model.eval()  # in training mode, activation checkpointing with a cache gives wrong tokens
            with torch.no_grad(), unwrap_model_for_generation(engine) if gathered else nullcontext():
                context = model.generate(
                    batch.target_ids[:, : self.prompt],
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([KeepReference(batch.target_ids, drawn)]),
                    synced_gpus=not gathered,
                )
            model.train()
            logits = engine(input_ids=context, use_cache=False).logits[:, self.prompt - 1 : -1]
            engine.backward(F.cross_entropy(logits.float().flatten(0, 1), batch.target_ids[:, self.prompt :].flatten()))
            engine.step()
