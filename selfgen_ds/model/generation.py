"""Whole answers from the model: generation in segments, and ZeRO-3's weights gathered once for many of them.

Token by token, a sharded model gathers every layer for every token. Gathered once, it is a plain model on each rank,
and the ranks need not keep step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from selfgen_ds.methods.method import AnswerNoise
from selfgen_ds.model.head import Sampler
from selfgen_ds.model.loading import most_positions
from selfgen_ds.ranks import process_group

_SEGMENT = 32  # tokens between two looks for finished rows
_SELECTABLE = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer)
_DRAWN_ROWS = 16  # rows whose probabilities exist at the same time


Choose = Callable[[Tensor, int, Tensor], Tensor]
"""`(rows, position, logits [N, V]) -> tokens [N]`: what stands at `position` (from 0) of the answers to some prompts of
a batch (`[N]` int64, their numbers)."""


def by_noise(noise: AnswerNoise, sample: Sampler, prompts: Tensor) -> Choose:
    """The token that the noise of (prompt, position in the answer) draws.

    Args:
        prompts: `[rows]` int64, the numbers by which the noise knows a batch's prompts.
    """

    def choose(rows: Tensor, position: int, logits: Tensor) -> Tensor:
        known = prompts[rows]
        return _sampled(sample, logits, noise(known, torch.full_like(known, position)))

    return choose


def in_place(tokens: Tensor, drawn: Tensor, uniforms: Tensor, sample: Sampler) -> Choose:
    """Given tokens, and drawn ones where there shall be.

    Args:
        tokens: `[rows, positions]` int64.
        drawn: `[rows, positions]` bool.
        uniforms: `[rows, positions]` float64 in (0, 1), the noise.
    """

    def choose(rows: Tensor, position: int, logits: Tensor) -> Tensor:
        here = drawn[rows, position]
        found = tokens[rows, position]
        found[here] = _sampled(sample, logits[here], uniforms[rows[here], position])
        return found

    return choose


def _sampled(sample: Sampler, logits: Tensor, uniforms: Tensor) -> Tensor:
    parts = zip(logits.split(_DRAWN_ROWS), uniforms.split(_DRAWN_ROWS), strict=True)
    return torch.cat([sample(*part) for part in parts])


class Chosen(LogitsProcessor):
    """Leaves one token a row possible.

    Args:
        rows: `[rows]` int64, the numbers of their prompts.
        start: Column where the answers begin.
    """

    def __init__(self, choose: Choose, rows: Tensor, start: int) -> None:
        self.choose, self.rows, self.start = choose, rows, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self.choose(self.rows, input_ids.shape[1] - self.start, scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    end_tokens: list[int],
    choose: Choose | None,
    in_step: Callable[[int], int] | None = None,
    needed: list[int] | None = None,
) -> list[list[int]]:
    """Answers to one batch of prompts, up to and with an end token. Rows that are finished are dropped on the way.

    An answer ends as well where the model's positions do.

    Args:
        prompts: Token ids, none empty. There may be no prompt on a rank that keeps step with others.
        choose: None means greedy.
        in_step: The largest of the ranks' values, where they must make the same forwards.
        needed: Tokens of each answer that are enough; there may be more.
    """
    device = model.device
    can_drop = drops_rows(model)
    segment = _SEGMENT if can_drop else max_new_tokens
    positions = most_positions(model.config)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=device)  # those that go on
    enough = None if needed is None else torch.tensor(needed, device=device)
    padding = end_tokens[0] if end_tokens else 0
    ids, mask = padded(prompts, device)
    start, cache = ids.shape[1], None
    done = 0
    while done < max_new_tokens and (in_step(len(rows)) if in_step else len(rows)):
        length = min(segment, max_new_tokens - done)
        if positions is not None and len(rows):  # all go on to the segment's end; an answer's last token takes none
            length = min(length, positions + 1 - int(mask.sum(dim=1).max()))
        if in_step:
            length = -in_step(-length)
        settings = GenerationConfig(
            max_new_tokens=length,
            eos_token_id=end_tokens or None,
            pad_token_id=padding,
            return_dict_in_generate=True,
        )
        processors = LogitsProcessorList()
        if choose is not None and len(rows):
            processors.append(Chosen(choose, rows, start))
        if not len(rows):  # takes part in the other ranks' gathers: a row that ends at once and holds nobody up
            (ids, mask), cache = padded([], device), None
            settings.forced_bos_token_id = padding
        output = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=settings,
            logits_processor=processors,
            synced_gpus=in_step is not None,
        )
        done += length
        if not len(rows):
            continue
        ids, cache = output.sequences, output.past_key_values
        ended = torch.isin(ids[:, start:], torch.tensor(end_tokens, dtype=torch.int64, device=device))
        for row, answer, end in zip(rows.tolist(), ids[:, start:].tolist(), ended.long().tolist(), strict=True):
            answers[row] = answer[: end.index(1) + 1] if 1 in end else answer
        mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] - mask.shape[1])], dim=1)
        finished = ended.any(dim=1)
        if positions is not None:
            finished |= mask.sum(dim=1) > positions
        if enough is not None:
            finished |= enough[rows] <= done
        if done == max_new_tokens or not can_drop:
            finished[:] = True
        if finished.any():
            kept = (~finished).nonzero().flatten()
            rows, ids, mask = rows[kept], ids[kept], mask[kept]
            if len(rows):
                cache.batch_select_indices(kept)
    return answers


def padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, padded on the left; one token for no prompt at all."""
    rows = [torch.tensor(prompt) for prompt in prompts or [[0]]]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids.to(device), mask.to(device)


def drops_rows(model: PreTrainedModel) -> bool:
    """Whether the model's cache can let go of single rows: one that holds attention alone."""
    if not model._supports_default_dynamic_cache():
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in _SELECTABLE for layer in layers)


def one_token_cache(model: PreTrainedModel) -> Cache | None:
    """What the model keeps of one row of one token. A forward: collective where the weights are sharded."""
    output = model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True)
    return output.get("past_key_values", output.get("cache_params"))


def cache_bytes(cache: Cache | None, longest: int) -> int:
    """What a model keeps of one row of `longest` tokens.

    Args:
        cache: Of one token.
    """
    total = 0
    for layer in [] if cache is None else cache.layers:
        tokens = min(longest, getattr(layer, "sliding_window", longest))
        for name, value in vars(layer).items():
            size = sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
            # everything else is a state of fixed size
            total += size * (tokens if name in ("keys", "values", "indexer_keys") else 1)
    return total


def free_bytes() -> int:
    """Memory that this rank may take now: of its accelerator, or its part of the host's."""
    get_accelerator().empty_cache()
    free = get_accelerator().available_memory()
    return free // process_group.local_world_size() if get_accelerator().device_name() == "cpu" else free


@contextmanager
def gathered_weights(offload: Any) -> Iterator[None]:
    """ZeRO-3's weights gathered and its hooks away: a plain model on every rank, until the end, come what may.

    Nothing may be gathered yet. The hooks go back as they were, every one in its place, so that the recorded order of
    modules stays valid; the hook of the root among them, whose absence would be a rank's own forward count.

    Args:
        offload: The engine's `optimizer.parameter_offload`.
    """
    handles = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
    places = {id(hooks): hooks for hooks in (handle.hooks_dict_ref() for handle in handles)}
    before = [(hooks, dict(hooks)) for hooks in places.values()]
    with deepspeed.zero.GatheredParameters(offload.module.parameters()):
        try:
            for handle in handles:
                handle.remove()
            yield
        finally:
            for hooks, saved in before:
                hooks.clear()
                hooks.update(saved)
