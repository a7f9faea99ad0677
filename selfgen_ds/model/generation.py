"""Generate whole answers in segments, so that finished rows can leave the batch between two segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    cache_utils,
)
from transformers.cache_utils import Cache, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from selfgen_ds.methods.method import AnswerNoise
from selfgen_ds.model.head import Sampler
from selfgen_ds.model.loading import most_positions
from selfgen_ds.model.transfer import to_device

_SEGMENT = 32  # tokens that are generated before finished rows are looked for
_SELECTABLE: tuple[type, ...] = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)
if hasattr(cache_utils, "DummyLayer"):  # of layers without a cache; older versions of transformers have none
    _SELECTABLE = (*_SELECTABLE, cache_utils.DummyLayer)
_DRAWN_ROWS = 16  # rows whose probabilities exist at the same time
_NOISE_POSITIONS = 32  # positions of the answers whose noise is made together

Sharing = Literal["any", "one length", "none"]
"""Which prompts may share a batch: any, with padding before the shorter ones; those of one length; or none."""

Choose = Callable[[Tensor, int, Tensor], Tensor]
"""`(rows, position, logits) -> tokens`: the token at `position` (from 0) of some answers.

`rows` are the numbers of the answers' prompts in their batch, `[N]` int64; `logits` are `[N, V]`, `tokens` `[N]` int64.
"""


def by_noise(noise: AnswerNoise, sample: Sampler, prompts: Tensor) -> Choose:
    """Return a function that chooses tokens by the noise of (prompt, position in the answer).

    The noise of some positions is made at a time, on the host: for each token alone, an accelerator would spend longer
    on its hundred small operations than on the token.

    Args:
        prompts: `[rows]` int64 on the host, the numbers by which the noise knows the prompts of a batch.
    """
    first, uniforms = -1, torch.empty(0)

    def choose(rows: Tensor, position: int, logits: Tensor) -> Tensor:
        nonlocal first, uniforms
        if position // _NOISE_POSITIONS * _NOISE_POSITIONS != first:
            first = position // _NOISE_POSITIONS * _NOISE_POSITIONS
            positions = torch.arange(first, first + _NOISE_POSITIONS).repeat(len(prompts))
            made = noise(prompts.repeat_interleave(_NOISE_POSITIONS), positions)
            uniforms = to_device(made.reshape(len(prompts), _NOISE_POSITIONS), logits.device)
        return _sample_in_parts(sample, logits, uniforms[rows, position - first])

    return choose


def in_place(tokens: Tensor, is_drawn: Tensor, uniforms: Tensor, sample: Sampler) -> Choose:
    """Return a function that draws the tokens at some positions and takes the given tokens at all others.

    Args:
        tokens: `[rows, positions]` int64, the given tokens.
        is_drawn: `[rows, positions]` bool, the positions to draw.
        uniforms: `[rows, positions]` float64 in (0, 1), the noise of the draws.
    """

    def choose(rows: Tensor, position: int, logits: Tensor) -> Tensor:
        draws = is_drawn[rows, position]
        chosen = tokens[rows, position]
        chosen[draws] = _sample_in_parts(sample, logits[draws], uniforms[rows[draws], position])
        return chosen

    return choose


def _sample_in_parts(sample: Sampler, logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample a few rows at a time, because the probabilities of all rows would take too much memory."""
    parts = zip(logits.split(_DRAWN_ROWS), uniforms.split(_DRAWN_ROWS), strict=True)
    return torch.cat([sample(*part) for part in parts])


class Chosen(LogitsProcessor):
    """Make only the token possible that `choose` returns for the row.

    Args:
        rows: `[rows]` int64, the numbers of the rows' prompts.
        start: Column of the answers' first token.
    """

    def __init__(self, choose: Choose, rows: Tensor, start: int) -> None:
        self.choose, self.rows, self.start = choose, rows, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self.choose(self.rows, input_ids.shape[1] - self.start, scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _UnfinishedRows:
    """The rows of a batch whose answers are not finished, with the model's cache of them.

    Args:
        end_tokens: Tokens that end an answer.
        in_step: Whether all ranks must run the same number of forwards.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], end_tokens: list[int], in_step: bool) -> None:
        self.model, self.end_tokens, self.in_step = model, end_tokens, in_step
        self.numbers = torch.arange(len(prompts), device=model.device)
        """`[rows]` int64, the numbers of the rows' prompts."""
        self.ids, self.mask = padded(prompts, model.device)
        self.start = self.ids.shape[1]
        """Column of the answers' first token."""
        self.cache: Cache | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def longest(self) -> int:
        """Return the tokens of the longest row, without padding."""
        return int(self.mask.sum(dim=1).max())

    def generate_segment(self, length: int, choose: Choose | None) -> None:
        """Generate at most `length` further tokens of each row: fewer if every row ends before."""
        processors = [] if choose is None else [Chosen(choose, self.numbers, self.start)]
        output = self._generate(self.ids, self.mask, self._settings(length), *processors)
        self.ids, self.cache = output.sequences, output.past_key_values
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self), self.ids.shape[1] - self.mask.shape[1])], dim=1)

    def idle(self, length: int) -> None:
        """Take part in the other ranks' forwards when no row is left.

        ZeRO-3 gathers weights from all ranks in every forward, so a rank without rows generates too: one row that ends
        at its first token and so does not prolong the segment.
        """
        ids, mask = padded([], self.model.device)
        self.cache = None
        settings = self._settings(length)
        settings.forced_bos_token_id = settings.pad_token_id
        self._generate(ids, mask, settings)

    def _settings(self, length: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=length,
            eos_token_id=self.end_tokens or None,
            pad_token_id=self.end_tokens[0] if self.end_tokens else 0,
            return_dict_in_generate=True,
        )

    def _generate(self, ids: Tensor, mask: Tensor, settings: GenerationConfig, *processors: LogitsProcessor) -> Any:
        return self.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=self.cache,
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
            synced_gpus=self.in_step,
        )

    def answers(self) -> tuple[dict[int, list[int]], Tensor]:
        """Return the answers so far, by the number of the prompt, and whether each has ended: `[rows]` bool.

        An answer includes its first end token and nothing after it.
        """
        tokens = self.ids[:, self.start :]
        ends = torch.isin(tokens, torch.tensor(self.end_tokens, dtype=torch.int64, device=tokens.device))
        answers = {}
        for number, answer, is_end in zip(self.numbers.tolist(), tokens.tolist(), ends.long().tolist(), strict=True):
            answers[number] = answer[: is_end.index(1) + 1] if 1 in is_end else answer
        return answers, ends.any(dim=1)

    def drop(self, finished: Tensor) -> None:
        """Drop the rows where `finished`, `[rows]` bool, is true."""
        if finished.any():
            kept = (~finished).nonzero().flatten()
            self.numbers, self.ids, self.mask = self.numbers[kept], self.ids[kept], self.mask[kept]
            if len(self):
                assert self.cache is not None
                self.cache.batch_select_indices(kept)


def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    end_tokens: list[int],
    choose: Choose | None,
    max_over_ranks: Callable[[int], int] | None = None,
    needed: list[int] | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[list[int]]:
    """Generate the answers to one batch of prompts, each up to and with an end token.

    Finished rows are dropped between segments. An answer also ends at the last position that the model has.

    Args:
        prompts: Token ids, none empty. A rank that runs in step with others may have no prompt.
        choose: Chooses the tokens; None takes the most probable ones.
        max_over_ranks: Returns the largest of the ranks' values, if all ranks must run the same number of forwards.
            Then `generate` is collective: every rank must call it.
        needed: Tokens of each answer that are enough; an answer may have more.
        progress: Called with the number of tokens by which all unfinished answers have grown.
    """
    rows = _UnfinishedRows(model, prompts, end_tokens, in_step=max_over_ranks is not None)
    largest = max_over_ranks or int  # without other ranks, a value is the largest
    can_drop = drops_rows(model)
    segment = _SEGMENT if can_drop else max_new_tokens
    positions = most_positions(model.config)
    enough = None if needed is None else torch.tensor(needed, device=model.device)
    answers: dict[int, list[int]] = {}
    done = 0
    while done < max_new_tokens and largest(len(rows)):
        length = min(segment, max_new_tokens - done)
        if positions is not None and len(rows):
            # All rows reach the end of the segment. The last token of an answer needs no position: no forward reads it.
            length = min(length, positions + 1 - rows.longest())
        length = -largest(-length)  # the shortest segment of any rank
        done += length
        progress(length)
        if not len(rows):
            rows.idle(length)
            continue
        rows.generate_segment(length, choose)
        new_answers, finished = rows.answers()
        answers |= new_answers
        if positions is not None:
            finished |= rows.mask.sum(dim=1) > positions
        if enough is not None:
            finished |= enough[rows.numbers] <= done
        if done == max_new_tokens or not can_drop:
            finished[:] = True
        rows.drop(finished)
    return [answers.get(number, []) for number in range(len(prompts))]


def stop_at(model: PreTrainedModel, end_tokens: list[int]) -> None:
    """Let `generate()` stop at the tokens that the training rows end with, in addition to the model's own end tokens.

    Exports write these tokens to `generation_config.json`: without them, the exported model would not stop.
    """
    before = model.generation_config.eos_token_id
    known = before if isinstance(before, list) else [] if before is None else [before]
    tokens = list(dict.fromkeys([*known, *end_tokens]))
    model.generation_config.eos_token_id = tokens[0] if len(tokens) == 1 else tokens


def padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `[rows, longest]` int64 token ids and attention mask, padded on the left.

    Without any prompt, the batch is one row of one token: `generate()` takes no empty batch.
    """
    rows = [torch.tensor(prompt) for prompt in prompts or [[0]]]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids.to(device), mask.to(device)


def drops_rows(model: PreTrainedModel) -> bool:
    """Return whether single rows can leave the model's cache: only a cache of attention alone allows that."""
    if not model._supports_default_dynamic_cache():
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in _SELECTABLE for layer in layers)
