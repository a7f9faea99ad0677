"""The model as methods and evaluation use it: draws (the self-generated-token pass), predictions, and answers.

While ZeRO-3 shards the weights, every call is collective: all ranks must make the same call, whatever rows they hold,
because each forward gathers weights from all ranks. All ranks then run the same number of forwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods.method import AnswerNoise, Policy
from selfgen_ds.model import generation, head
from selfgen_ds.model.budget import SweepBudget, split_rows
from selfgen_ds.model.cross_entropy import Projection
from selfgen_ds.model.gathering import GatherableModel, evaluating
from selfgen_ds.model.generation import Sharing
from selfgen_ds.model.reductions import packed_settings, places_of
from selfgen_ds.model.transfer import to_device, to_host
from selfgen_ds.progress import SECONDS, bar
from selfgen_ds.ranks import process_group


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution that tokens are drawn from, as in `transformers`' generation."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def of(cls, selfgen: SelfgenConfig) -> Sampling:
        """Return the distribution that the draws of a recipe have."""
        return cls(temperature=selfgen.temperature, top_p=selfgen.top_p, top_k=selfgen.top_k)


class EnginePolicy(GatherableModel, Policy):
    """The policy of the current weights.

    Args:
        forward: A model with reductions (`selfgen_ds.model.reductions.add_reductions`), or the DeepSpeed engine of one.
        end_tokens: Tokens that end an answer.
        budget: The size of one no-grad sweep; None means that a sweep reads all micro-batches of a step.
        generation_batch_size: The most rows that a rank generates at the same time.
        sharing: Which prompts may share a batch.
    """

    def __init__(
        self,
        forward: DeepSpeedEngine | PreTrainedModel,
        *,
        end_tokens: list[int],
        sampling: Sampling | None = None,
        budget: SweepBudget | None = None,
        generation_batch_size: int = 64,
        sharing: Sharing = "any",
    ) -> None:
        super().__init__(forward, generation_batch_size)
        self.end_tokens = end_tokens
        self.sampling = sampling or Sampling()
        self.budget = budget
        self.sharing = sharing
        self.groups = 0
        """Sweeps that the last `draw` took."""
        self._pass_seconds = math.inf
        self._gathered_in_training = False
        """Whether ZeRO-3's limits let a training step hold all weights, so that a pass may leave them gathered."""
        if self.sharded:
            parameters = sum(p.ds_numel for p in self.model.parameters())
            limits = forward.zero_max_live_parameters(), forward.zero_max_reuse_distance()
            self._gathered_in_training = parameters <= min(limits)

    @torch.no_grad()
    def draw(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        """Draw the masked tokens of a step's micro-batches (`selfgen_ds.methods.method.Policy`).

        All micro-batches go through the model in one sweep of parameter gathers, or in the fewest sweeps whose memory
        stays under the training step's. A row without a masked token is not read, nor is a token after the last masked
        one. Collective: every rank must call this.
        """
        started = time.perf_counter()
        context, mask, noise = _stack_step(batches, masks, uniforms)
        position_ids = _stack([batch.position_ids for batch in batches])
        lengths = _lengths_to_last_masked(mask)
        most = self.budget.tokens(max(batch.context_ids.numel() for batch in batches)) if self.budget else math.inf
        groups = split_rows(lengths, min(most, self._most_tokens()))
        self.groups = self.max_over_ranks(len(groups))
        self.read_tokens += int(lengths.sum())

        parts = [torch.zeros(0, dtype=torch.int64)]
        with evaluating(self.forward):
            for rows in groups:
                length = int(lengths[rows].max())
                masked = mask[rows, :length]
                drawing = self._drawing(to_device(noise[rows, :length][masked], self.device))
                packed = position_ids[rows, :length] if batches[0].packed else None
                parts.append(self._read(context[rows, :length], masked, drawing, packed))
            for _ in range(self.groups - len(groups) if self.sharded else 0):
                self._idle_forward()
        if self.sharded and not self._gathered_in_training:
            # Weights that a forward without a backward leaves gathered would stay gathered through the training step.
            self.forward.optimizer.parameter_offload.partition_all_parameters()
        drawn = torch.zeros_like(context)
        tokens = to_host(torch.cat(parts[1:] or parts)).split([int(mask[rows].sum()) for rows in groups])
        for rows, of_group in zip(groups, tokens, strict=True):
            drawn[rows] = torch.zeros_like(drawn[rows]).masked_scatter(mask[rows], of_group)
        self._pass_seconds = time.perf_counter() - started
        return _unstack(drawn, masks)

    def _drawing(self, uniforms: Tensor) -> head.Reduction:
        return head.draw(uniforms, **vars(self.sampling))

    def _read(
        self, context: Tensor, mask: Tensor, reduction: head.Reduction, position_ids: Tensor | None = None
    ) -> Any:
        """Return what a reduction makes of the hidden states that predict the masked tokens.

        Args:
            context, mask: `[rows, length]`, on the host.
            position_ids: `[rows, length]` int64, only for packed rows.
        """
        return self._module(
            to_device(context, self.device),
            positions=to_device(places_of(mask), self.device),
            reduction=reduction,
            packed=None if position_ids is None else packed_settings(self.model, position_ids[:, :-1]),
        )

    @property
    def can_draw_in_order(self) -> bool:
        """Whether `draw_in_order` can be called now: with gathered weights, if rows can leave the cache."""
        return self._inside_gathered and not self.sharded and generation.drops_rows(self.model)

    @torch.no_grad()
    def draw_in_order(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        """Draw the masked tokens, each given the tokens drawn before it (`selfgen_ds.methods.method.Policy`).

        How many passes like the last one take as long is measured, and decides when the next rows are drawn in order.
        Collective: every rank must call this.
        """
        started = time.perf_counter()
        context, mask, noise = _stack_step(batches, masks, uniforms)
        sample = head.sampler(**vars(self.sampling))
        first, ends = mask.long().argmax(dim=1), _lengths_to_last_masked(mask)
        order = first.argsort(stable=True)
        order = order[mask[order].any(dim=1)]
        with evaluating(self.forward), _no_generation_defaults(self.model):
            for rows in filter(len, order.split(self.rows_at_once)):
                # All rows start at the same column, and tokens that are not drawn are given: so no row is padded, and
                # the cache is no wider than the longest row.
                start, end = int(first[rows].min()), int(ends[rows].max())
                is_drawn = mask[rows, start:end]
                given, drawn, of_draws = (
                    to_device(one[rows, start:end], self.device) for one in (context, mask, noise)
                )
                choose = generation.in_place(given, drawn, of_draws, sample)
                prompts, needed = context[rows, :start].tolist(), (ends[rows] - start).tolist()
                answers = generation.generate(self.model, prompts, end - start, [], choose, needed=needed)
                tokens = pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True)
                self.read_tokens += int(ends[rows].sum())
                row, column = is_drawn.nonzero(as_tuple=True)
                context[rows[row], start + column] = tokens[row, column]
        self.passes_in_order = self.max_over_ranks(round((time.perf_counter() - started) / self._pass_seconds))
        return _unstack(context, masks)

    def _in_batches(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return the numbers of the prompts in batches, the longest prompts first."""
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
        groups = [order]
        if self.sharing == "one length":
            groups = [list(numbers) for _, numbers in groupby(order, key=lambda number: len(prompts[number]))]
        size = 1 if self.sharing == "none" else self.rows_at_once
        return [group[first : first + size] for group in groups for first in range(0, len(group), size)]

    def _idle_forward(self) -> None:
        """Run a forward whose result is not used, to take part in the other ranks' gathers.

        The batch is one row of two tokens, none of them masked: the backbone reads all but the last token of a row, so
        two tokens are the fewest that run every layer.
        """
        padding = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        noise = torch.empty(0, dtype=torch.float64, device=self.device)
        self.forward(padding, positions=padding[0, :0], reduction=self._drawing(noise))

    @torch.no_grad()
    def predict(self, batch: TokenBatch) -> head.Prediction:
        """Predict the target tokens of a batch from its contexts. The result is in row-major order, on the host."""
        rows_at_once = len(batch.context_ids)
        if not self.sharded:  # no other rank waits for this one, so the number of forwards is free
            rows_at_once = max(1, int(min(rows_at_once, self._most_tokens() // batch.context_ids.shape[1])))
        parts = []
        with evaluating(self.forward):
            for first in range(0, len(batch.context_ids), rows_at_once):
                rows = slice(first, first + rows_at_once)
                targets = batch.target_ids[rows][batch.loss_mask[rows]]
                reduction = head.predict(to_device(targets, self.device))
                packed = None if batch.packed_position_ids is None else batch.packed_position_ids[rows]
                parts.append(self._read(batch.context_ids[rows], batch.loss_mask[rows], reduction, packed))
        return head.Prediction(*(to_host(torch.cat(values)) for values in zip(*parts, strict=True)))

    @torch.no_grad()
    def hidden_states(self, batch: TokenBatch) -> tuple[Tensor, Projection]:
        """Return the hidden states that predict the targets, `[targets, H]`, and what makes logits of them.

        Only for weights that are whole on this rank: sharded ones leave the head's weight after the forward.
        """
        seen: list[tuple[Tensor, Projection]] = []

        def reduction(hidden: Tensor, project: Projection) -> Tensor:
            seen.append((hidden, project))
            return hidden

        with evaluating(self.forward):
            self._read(batch.context_ids, batch.loss_mask, reduction)
        return seen[0]

    @torch.no_grad()
    def complete(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        noise: AnswerNoise | None = None,
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """Generate the model's answers, up to and with an end token (`selfgen_ds.methods.method.Policy`).

        Collective if the weights are sharded: every rank must call this. With noise, a token depends only on its
        prompt, the weights, and its uniform, up to the rounding of the forward's kernels at other batch shapes.

        Args:
            sampling: The distribution that noise draws from; None means the policy's own.
        """
        started = time.perf_counter()
        sample = head.sampler(**vars(sampling or self.sampling))
        batches = self._in_batches(prompts)
        max_over_ranks = self.max_over_ranks if self.sharded and dist.get_world_size() > 1 else None
        idle = max_over_ranks(len(batches)) - len(batches) if max_over_ranks else 0
        answers: list[list[int]] = [[] for _ in prompts]
        most = (len(batches) + idle) * max_new_tokens
        hidden = process_group.rank() != 0
        with (
            evaluating(self.forward),
            _no_generation_defaults(self.model),
            bar("answers", "token", total=most, delay=SECONDS, leave=False, disable=hidden) as shown,
        ):
            for numbers in batches + [[]] * idle:
                choose = None
                if noise is not None:
                    choose = generation.by_noise(noise, sample, torch.tensor(numbers))
                batch = [prompts[number] for number in numbers]
                batch_answers = generation.generate(
                    self.model, batch, max_new_tokens, self.end_tokens, choose, max_over_ranks, progress=shown.update
                )
                for number, answer in zip(numbers, batch_answers, strict=True):
                    answers[number] = answer
        self.generated_tokens += sum(map(len, answers))
        self.read_tokens += sum(map(len, prompts)) + sum(map(len, answers))
        self.generation_seconds += time.perf_counter() - started
        return answers


@contextmanager
def _no_generation_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's own generation defaults inside: `generate()` would read them for every setting not passed.

    For example, the defaults of many chat models ask for sampling.
    """
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults


def _lengths_to_last_masked(mask: Tensor) -> Tensor:
    """Return the tokens of each row up to and with the last masked one: `[rows]` int64, 0 without a masked token."""
    return (mask * torch.arange(1, mask.shape[1] + 1)).amax(dim=1)


def _stack_step(
    batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Stack contexts, masks, and noise of a step's micro-batches, each `[rows, longest]`.

    The noise is 0 where nothing is drawn.
    """
    noise = [u.new_zeros(mask.shape).masked_scatter(mask, u) for mask, u in zip(masks, uniforms, strict=True)]
    return _stack([batch.context_ids for batch in batches]), _stack(masks), _stack(noise)


def _stack(tensors: list[Tensor]) -> Tensor:
    """Stack `[batch, length]` tensors of several lengths into one `[rows, longest]`, padded with zeros."""
    return pad_sequence([row for tensor in tensors for row in tensor], batch_first=True)


def _unstack(tokens: Tensor, masks: list[Tensor]) -> list[Tensor]:
    """Take the masked tokens of each micro-batch, `[masked]` int64, out of a `[rows, longest]` stack."""
    parts = tokens.split([len(mask) for mask in masks])
    return [part[:, : mask.shape[1]][mask] for part, mask in zip(parts, masks, strict=True)]
