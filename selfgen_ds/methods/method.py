"""What a method is, what it is told about the run, and what it may ask of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.data.correction import Correction
from selfgen_ds.data.samples import Sample, Samples
from selfgen_ds.data.stored_row import StoredRow

AnswerNoise = Callable[[Tensor, Tensor], Tensor]
"""`(prompts, positions) -> uniforms`: float64 in (0, 1) for the token at `positions` (int64, from 0) of the answers to
some of the given prompts (int64, their numbers), all `[N]`."""


class Policy:
    """The model, as a method sees it. Collective: every rank makes the same calls, whatever rows it holds."""

    device = torch.device("cpu")
    """Of windows, masks and noise."""

    def draw(self, window: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        """Draw the masked tokens of a window, each from the model's distribution given its prefix in the context.

        Args:
            window: The micro-batches of one optimizer step.
            masks: `[batch, length]` bool, the tokens to draw; never a sample's first.
            uniforms: Float64 in (0, 1), one a masked token, in row-major order: the noise of the draw.

        Returns:
            The drawn ids, one `[masked]` int64 tensor a micro-batch, in the same order.
        """
        raise NotImplementedError

    @property
    def can_draw_in_order(self) -> bool:
        """Whether there is `draw_in_order` now; the same on all ranks."""
        return False

    def draw_in_order(self, window: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        """As `draw`, but each token is drawn given those that were drawn before it: an exact draw.

        Args:
            window: Rows of one sample each.
        """
        raise NotImplementedError

    def complete(
        self, prompts: list[list[int]], max_new_tokens: int, noise: AnswerNoise | None = None
    ) -> list[list[int]]:
        """The model's own answers, up to and with an end token.

        Args:
            prompts: Token ids, one list a row, none empty; there may be no row.
            max_new_tokens: The same on every rank.
            noise: Of the draws; none means greedy.
        """
        raise NotImplementedError

    def max_over_ranks(self, value: int) -> int:
        """The largest of the ranks' values; there is one rank unless a policy knows of more."""
        return value


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a method is told about the run."""

    seed: int
    total_steps: int
    step_size: int
    """Rows an optimizer step takes, over all ranks."""
    epoch_size: int
    """Rows of an epoch."""
    micro_batch_size: int
    max_length: int
    tokenizer: PreTrainedTokenizerBase
    correction: Correction


class Method:
    """Chooses the context `c` that the model reads; the target is always the reference. As it is: teacher forcing.

    A method holds no state that a restart needs.
    """

    settings: ClassVar[frozenset[str]] = frozenset()
    """Fields of `selfgen` that it reads; others are refused in its recipes."""
    passes: int = 0
    """Self-generated-token passes of the last step."""

    def __init__(self, config: SelfgenConfig, plan: Plan) -> None:
        self.config = config
        self.plan = plan

    def replace_probability(self, step: int) -> float:
        """p of the mixture in this optimizer step (from 0)."""
        return 0.0

    def contexts(self, window: list[TokenBatch], policy: Policy, step: int) -> list[TokenBatch]:
        """The micro-batches of one optimizer step with contexts to read. Collective if it asks the policy."""
        return window


class RoundMethod(Method):
    """Draws the contexts of the whole data set at the start of each round, with the weights of that moment.

    A round lasts `selfgen.epochs_per_round` epochs of the data set; rounds count from 0.
    """

    keeps_lengths: ClassVar[bool] = True
    """Whether its rows are as long as the samples, so that they can be packed."""

    def __init__(self, config: SelfgenConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.longest = plan.max_length
        """Tokens of the longest row that it has the model read or generate."""

    def check(self, samples: list[Samples]) -> None:
        """Refuse data that the method cannot work with, before the first step.

        Raises:
            InputError: It cannot.
        """

    def round_of(self, step: int) -> int:
        """The round of an optimizer step."""
        return step * self.plan.step_size // (self.config.epochs_per_round * self.plan.epoch_size)

    def first_step(self, number: int) -> int:
        """The first optimizer step of a round."""
        return -(-number * self.config.epochs_per_round * self.plan.epoch_size // self.plan.step_size)

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        return self.round_of(self.plan.total_steps - 1) + 1

    def rows(self, samples: list[Sample], policy: Policy, number: int) -> tuple[list[StoredRow], dict[str, int]]:
        """What the model reads and learns in a round in the place of some samples. Collective.

        Args:
            samples: Some of the data set; none on a rank that has nothing left to draw.

        Returns:
            The rows, in the order of the samples, and counts for the record, of which `passes` is not summed up.
        """
        raise NotImplementedError

    def select(self, sample_ids: np.ndarray, equal: np.ndarray, number: int) -> np.ndarray:
        """The rows of a source that are trained on: their numbers, ascending int64.

        Args:
            sample_ids: `[rows]` int64.
            equal: `[rows]` bool, whether the own answer is the reference.
        """
        return np.arange(len(sample_ids))
