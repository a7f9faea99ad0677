"""What methods and evaluation ask of the model: draws (the self-generated-token pass), predictions, answers.

Every call is collective under ZeRO-3: all ranks make it, whatever rows they hold, and run the same number of
forwards.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods.method import AnswerNoise, Policy
from selfgen_ds.model import generation, head
from selfgen_ds.model.budget import SweepBudget, row_bytes, token_bytes

log = logging.getLogger("selfgen_ds")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution that draws come from."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class EnginePolicy(Policy):
    """The current weights as a policy.

    Args:
        forward: What is called for a forward: the DeepSpeed engine, or the model itself.
        model: The extended model (`selfgen_ds.model.reductions.add_reductions`).
        end_tokens: Each of them ends an answer.
        budget: Size of one no-grad sweep; none means the whole window in one.
        generation_batch_size: Rows that a rank generates at once, at most.
    """

    def __init__(
        self,
        forward: DeepSpeedEngine | PreTrainedModel,
        model: PreTrainedModel,
        *,
        end_tokens: list[int],
        sampling: Sampling | None = None,
        budget: SweepBudget | None = None,
        generation_batch_size: int = 64,
    ) -> None:
        self.forward = forward
        self.model = model
        self.end_tokens = end_tokens
        self.sampling = sampling or Sampling()
        self.budget = budget
        self.device = torch.device(forward.device)
        self.groups = 0
        """Sweeps that the last `draw` was split into."""
        self.rows_at_once = generation_batch_size
        self.sharded = isinstance(forward, DeepSpeedEngine) and forward.zero_optimization_partition_weights()
        """Whether a forward gathers weights now, so that all ranks must make the same ones."""
        self._inside_gathered = False
        self._spare = math.inf
        """Bytes that a forward may take, inside `gathered`."""
        self._one_token_cache: Cache | None = None
        self._choice: bool | None = None
        """Whether weights were gathered the last time."""
        self._tokens, self._seconds = 0, 0.0  # of answers
        self._whole_in_training = False
        """Whether ZeRO-3's limits let a training step hold all weights, so that it need not gather a pass's again."""
        if self.sharded:
            parameters = sum(p.ds_numel for p in model.parameters())
            limits = forward.zero_max_live_parameters(), forward.zero_max_reuse_distance()
            self._whole_in_training = parameters <= min(limits)

    @contextmanager
    def gathered(self, longest: int) -> Iterator[None]:
        """Many answers, draws or predictions in a row: weights that are sharded are gathered once if they fit.

        They fit where they and the working memory of at least one row fit into the memory that is free now, on all
        ranks, unless they are on disk. Otherwise they stay sharded and the ranks in step. Either way no more rows are
        generated at once than fit. Inside another one it changes nothing. Collective.

        Args:
            longest: Tokens of the longest row, prompt and answer.
        """
        if self._inside_gathered:
            yield
            return
        before = self.sharded, self.rows_at_once
        with ExitStack() as stack:
            stack.enter_context(_evaluating(self.forward))
            offload = self.forward.optimizer.parameter_offload if self.sharded else None
            row = self._row_bytes(longest)
            if offload is not None:
                offload.partition_all_parameters()  # what is gathered now counts as free
                # a forward without a backward leaves parameters on their way, which nothing else may gather
                stack.callback(offload.partition_all_parameters)
            gathers, rows = self._choose(row)
            announced = self.sharded and gathers != self._choice
            self._choice = gathers
            if gathers:
                stack.enter_context(generation.gathered_weights(offload))
            self.sharded, self.rows_at_once, self._inside_gathered = self.sharded and not gathers, rows, True
            self._tokens, self._seconds = 0, 0.0
            try:
                yield
            finally:
                (self.sharded, self.rows_at_once), self._inside_gathered, self._spare = before, False, math.inf
        if announced and self._tokens:
            rate = self._tokens / self._seconds
            log.info("rollouts: %d tokens in %.1f s on this rank, %.0f a second", self._tokens, self._seconds, rate)

    def _choose(self, row: int) -> tuple[bool, int]:
        """Whether to gather sharded weights, and the rows to generate at once, the same on all ranks that keep step.

        Logged with its reasons, the first time and whenever it is another.

        Args:
            row: Bytes to generate one row.
        """
        weights = live = 0
        if self.sharded:
            parameters = list(self.model.parameters())
            weights = sum(p.ds_numel * p.element_size() for p in parameters)
            live = min(weights, self.forward.zero_max_live_parameters() * self.model.dtype.itemsize)
        free = generation.free_bytes()
        room = 0.9 * free  # the rest for what is not counted

        def fitting(taken: int) -> int:
            rows = int((room - taken) // row)
            return -self.max_over_ranks(-rows) if self.sharded else rows

        rows = fitting(weights)
        gathers = self.sharded and rows >= 1 and not self._on_disk()
        if self.sharded and not gathers:
            rows = fitting(live)
        self._spare = room - (weights if gathers else live)
        rows = max(1, min(self.rows_at_once, rows))
        if self.sharded and gathers != self._choice:
            log.info(
                "rollouts: weights of %.1f MB %s; %d rows at once, each %.1f MB; %.1f MB free",
                weights / 1e6,
                "are gathered once"
                if gathers
                else "stay sharded, to be gathered for every forward: every token, or pass",
                rows,
                row / 1e6,
                free / 1e6,
            )
        return gathers, rows

    def _on_disk(self) -> bool:
        """Whether sharded weights are read from disk, into a few buffers: DeepSpeed cannot gather them all at once."""
        offload = self.forward.zero_offload_param()
        return offload is not None and offload.device == OffloadDeviceEnum.nvme

    def _row_bytes(self, longest: int) -> int:
        """Memory to generate one row."""
        if self._one_token_cache is None:
            with _evaluating(self.forward):  # nothing is cached in training with activation checkpointing
                self._one_token_cache = generation.one_token_cache(self.model)
        cache = generation.cache_bytes(self._one_token_cache, longest)
        return cache + row_bytes(self.model.config, self.model.dtype.itemsize, longest)

    def _most_tokens(self) -> float:
        """Tokens of one forward that fit into the memory that was free, inside `gathered`; otherwise no limit."""
        return max(0.0, self._spare) / token_bytes(self.model.config, self.model.dtype.itemsize)

    @torch.no_grad()
    def draw(self, window: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        """Draw the masked tokens of a window (`selfgen_ds.methods.method.Policy`).

        All micro-batches go through the model in one sweep of parameter gathers, or in the fewest that keep its
        memory under the training step's. Rows without a masked token stay out, and nothing past the last masked
        token is computed.
        """
        device = window[0].context.device
        context, mask = _stack([batch.context for batch in window]), _stack(masks)
        noise, position_ids = _stack(_spread(masks, uniforms)), _stack([batch.position_ids for batch in window])
        columns = torch.arange(mask.shape[1], device=device)
        lengths = (mask * (columns + 1)).amax(dim=1)  # up to and with the last masked token
        most = self.budget.tokens(max(batch.context.numel() for batch in window)) if self.budget else math.inf
        groups = _groups(lengths, min(most, self._most_tokens()))
        self.groups = self.max_over_ranks(len(groups))

        drawn = torch.zeros_like(context)
        with _evaluating(self.forward):
            for rows in groups:
                length = int(lengths[rows].max())
                chosen, where = context[rows, :length], mask[rows, :length]
                reduction = head.draw(noise[rows, :length][where], **vars(self.sampling))
                packed = position_ids[rows, :length] if window[0].packed else None
                tokens = self._module(chosen, positions=where, reduction=reduction, position_ids=packed)
                drawn[rows, :length] = torch.zeros_like(chosen).masked_scatter(where, tokens)
            for _ in range(self.groups - len(groups) if self.sharded else 0):
                self._idle_forward(device)
        if self.sharded and not self._whole_in_training:
            # what a forward without a backward leaves gathered would stay through the training step
            self.forward.optimizer.parameter_offload.partition_all_parameters()
        sizes = [len(m) for m in masks]
        return [d[:, : m.shape[1]][m] for d, m in zip(drawn.split(sizes), masks, strict=True)]

    @property
    def can_draw_in_order(self) -> bool:
        """Whether weights are whole for many draws in a row, and the model's cache holds attention alone."""
        return self._inside_gathered and not self.sharded and generation.drops_rows(self.model)

    @torch.no_grad()
    def draw_in_order(self, window: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        """As `draw`, each token given those drawn before it (`selfgen_ds.methods.method.Policy`)."""
        context, mask, noise = (
            _stack([batch.context for batch in window]),
            _stack(masks),
            _stack(_spread(masks, uniforms)),
        )
        sample = head.sampler(**vars(self.sampling))
        columns = torch.arange(mask.shape[1], device=mask.device)
        first, behind = mask.long().argmax(dim=1), (mask * (columns + 1)).amax(dim=1)
        order = first.argsort(stable=True)
        order = order[mask[order].any(dim=1)]
        with _evaluating(self.forward), _no_generation_defaults(self.model):
            for rows in filter(len, order.split(self.rows_at_once)):
                # all from the same column, what is given among it: no padding, and no cache wider than the longest row
                start, end = int(first[rows].min()), int(behind[rows].max())
                drawn = mask[rows, start:end]
                choose = generation.in_place(context[rows, start:end], drawn, noise[rows, start:end], sample)
                prompts, needed = context[rows, :start].tolist(), (behind[rows] - start).tolist()
                answers = generation.generate(self.model, prompts, end - start, [], choose, needed=needed)
                found = pad_sequence([torch.tensor(answer, device=mask.device) for answer in answers], batch_first=True)
                row, column = drawn.nonzero(as_tuple=True)
                context[rows[row], start + column] = found[row, column]
        sizes = [len(m) for m in masks]
        return [c[:, : m.shape[1]][m] for c, m in zip(context.split(sizes), masks, strict=True)]

    @property
    def _module(self) -> nn.Module:
        """What is called for a forward: behind the engine's back where its hooks are away."""
        return self.model if self._inside_gathered and not self.sharded else self.forward

    def max_over_ranks(self, value: int) -> int:
        """The largest of the ranks' values. Collective."""
        result = torch.tensor(value, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(result, op=dist.ReduceOp.MAX)
        return int(result)

    def _idle_forward(self, device: torch.device) -> None:
        """Take part in the other ranks' gathers."""
        nothing = torch.zeros(1, 2, dtype=torch.bool, device=device)
        noise = torch.empty(0, dtype=torch.float64, device=device)
        self.forward(nothing.long(), positions=nothing, reduction=head.draw(noise, **vars(self.sampling)))

    @torch.no_grad()
    def predict(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Teacher-forced predictions at the batch's response tokens, in row-major order.

        Returns:
            The most probable token, `[responses]` int64, and the reference's log-probability, float32.
        """
        rows = len(batch.context)
        if not self.sharded:  # then no other rank waits for this one's forwards
            rows = max(1, int(min(rows, self._most_tokens() // batch.context.shape[1])))
        parts = []
        with _evaluating(self.forward):
            for first in range(0, len(batch.context), rows):
                some = slice(first, first + rows)
                where, packed = batch.loss_mask[some], batch.packed_position_ids
                part = self._module(
                    batch.context[some],
                    positions=where,
                    reduction=head.predict(batch.target[some][where]),
                    position_ids=None if packed is None else packed[some],
                )
                parts.append(part)
        best, log_probabilities = zip(*parts, strict=True)
        return torch.cat(best), torch.cat(log_probabilities)

    @torch.no_grad()
    def complete(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        noise: AnswerNoise | None = None,
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """The model's own answers, up to and with an end token (`selfgen_ds.methods.method.Policy`).

        Collective where weights are sharded. With noise, a token is a function of prompt, weights and its uniform
        alone, up to the rounding of the forward's kernels at other batch shapes.

        Args:
            sampling: The distribution that noise draws from; by default the policy's own.
        """
        started = time.perf_counter()
        sample = head.sampler(**vars(sampling or self.sampling))
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
        batches = [order[first : first + self.rows_at_once] for first in range(0, len(order), self.rows_at_once)]
        in_step = self.max_over_ranks if self.sharded and dist.get_world_size() > 1 else None
        idle = in_step(len(batches)) - len(batches) if in_step else 0
        answers: list[list[int]] = [[] for _ in prompts]
        with _evaluating(self.forward), _no_generation_defaults(self.model):
            for numbers in batches + [[]] * idle:
                known = torch.tensor(numbers, device=self.device)
                choose = None if noise is None else generation.by_noise(noise, sample, known)
                some = [prompts[number] for number in numbers]
                found = generation.generate(self.model, some, max_new_tokens, self.end_tokens, choose, in_step)
                for number, answer in zip(numbers, found, strict=True):
                    answers[number] = answer
        self._tokens += sum(map(len, answers))
        self._seconds += time.perf_counter() - started
        return answers


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout, no activation checkpointing; the mode is put back."""
    # an engine's own mode is not that of its model
    training = module.module.training if isinstance(module, DeepSpeedEngine) else module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def _no_generation_defaults(model: PreTrainedModel) -> Iterator[None]:
    """`generate()` takes what it is not told from the model's own defaults: a chat model's say "sample"."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults


def _stack(tensors: list[Tensor]) -> Tensor:
    """`[batch, length]` tensors of several lengths as one `[batches, longest]`, padded with zeros."""
    return pad_sequence([row for tensor in tensors for row in tensor], batch_first=True)


def _spread(masks: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """`[masked]` values at their `[batch, length]` positions, zeros elsewhere."""
    return [v.new_zeros(m.shape).masked_scatter(m, v) for m, v in zip(masks, values, strict=True)]


def _groups(lengths: Tensor, most: float) -> list[Tensor]:
    """Row numbers of the fewest groups with at most `most` tokens, padding included; rows of length 0 in none.

    Args:
        lengths: `[rows]` int64.
    """
    order = lengths.argsort(descending=True, stable=True)
    groups: list[list[int]] = []
    longest = 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length == 0:
            break
        if not groups or (len(groups[-1]) + 1) * longest > most:
            groups.append([])
            longest = length
        groups[-1].append(row)
    return [torch.tensor(group, device=lengths.device) for group in groups]
