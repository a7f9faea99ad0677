"""The interface of a method: the facts about the run that it gets, and the policy through which it asks the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.data.correction import Correction
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.samples import Samples

SAMPLING = frozenset({"temperature", "top_p", "top_k"})
"""Settings that every method with draws reads."""
ROUNDS = frozenset({"epochs_per_round", "reject", "rollouts", "generation_batch_size"})
"""Settings that every method with rounds reads."""
ANSWERS = frozenset({"max_new_tokens", "generate_command"})
"""Settings that every method whose rounds are made of whole answers reads."""

AnswerNoise = Callable[[Tensor, Tensor], Tensor]
"""The noise of answers: `(prompts, positions) -> uniforms`, all `[N]`.

`prompts` are int64 numbers of prompts and `positions` int64 positions in the answers, from 0. The result is float64
in (0, 1): one uniform for each of these tokens.
"""


class Policy:
    """The model, as a method sees it.

    Every call is collective: under ZeRO-3 a forward gathers weights from all ranks, so that every rank must make the
    same calls, whatever rows it holds. Batches, masks, noise and drawn tokens are on the host.
    """

    def draw(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        """Draw the masked tokens, each from the model's distribution given the tokens before it in the context.

        Args:
            batches: The micro-batches of one optimizer step.
            masks: For each batch, `[batch, length]` bool: the tokens to draw; never a sample's first token.
            uniforms: For each batch, `[masked]` float64 in (0, 1) in row-major order: the noise of the draws.

        Returns:
            The drawn ids of each batch, `[masked]` int64 in the same order.
        """
        raise NotImplementedError

    passes_in_order = 8
    """Passes of `draw` that take as long as `draw_in_order`: 3 to 17 were measured on CPUs."""

    @property
    def can_draw_in_order(self) -> bool:
        """Whether `draw_in_order` can be called now; the same on all ranks."""
        return False

    def draw_in_order(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        """Draw as `draw` does, but each token given the tokens drawn before it: an exact draw.

        Args:
            batches: Micro-batches whose rows hold one sample each.
        """
        raise NotImplementedError

    def complete(
        self, prompts: list[list[int]], max_new_tokens: int, noise: AnswerNoise | None = None
    ) -> list[list[int]]:
        """Generate the model's answers, each up to and including its end token.

        Args:
            prompts: Token ids, one list per row, none of them empty. A rank may have no row.
            max_new_tokens: Most tokens of an answer; the same on every rank.
            noise: The noise of the draws; without it, decoding is greedy.
        """
        raise NotImplementedError

    def max_over_ranks(self, value: int) -> int:
        """Return the largest of the ranks' values. A policy that knows only this rank returns the value."""
        return value


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Facts about the run that a method may use."""

    seed: int
    """Seed of the run, a key of every draw (`selfgen_ds.hashing`)."""
    total_steps: int
    """Optimizer steps of the whole run."""
    step_size: int
    """Rows of one optimizer step, over all ranks."""
    epoch_size: int
    """Rows of one epoch."""
    micro_batch_size: int
    """Rows per rank in one forward."""
    max_length: int
    """Most tokens of a row (`data.max_length`)."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer of the training rows."""
    correction: Correction
    """The request to correct an answer; empty for a method that does not read `selfgen.cue`."""


class Method:
    """Chooses the context that the model reads; the target is always the reference.

    This base class keeps the reference, which is teacher forcing. A method holds no state that a restart needs.
    """

    settings: ClassVar[frozenset[str]] = frozenset()
    """Fields of `selfgen` that the method reads. A recipe for the method may set no other field."""
    keeps_rows: ClassVar[bool] = True
    """Whether the method trains on one row per sample, as long as the sample. Only such rows can be packed."""
    has_rounds: ClassVar[bool] = False
    """Whether the method draws contexts in rounds: asked of the class, before there is a method to ask."""
    passes: int = 0
    """Self-generated-token passes of the last step."""
    scale: float = 1.0
    """Factor on p, which the training loop lowers if the run runs away (`selfgen.runaway: lower`)."""

    def __init__(self, config: SelfgenConfig, plan: Plan) -> None:
        self.config = config
        self.plan = plan

    def as_round_method(self) -> RoundMethod | None:
        """Return the method if it draws contexts in rounds, otherwise None."""
        return None

    def check(self, samples: list[Samples]) -> None:
        """Refuse data that the method cannot work with, and take from the data what the method needs to know.

        Raises:
            InputError: The method cannot work with these samples.
        """

    def replace_probability(self, step: int) -> float:
        """Return p of the mixture in an optimizer step (from 0)."""
        return 0.0

    def contexts(self, batches: list[TokenBatch], policy: Policy, step: int) -> list[TokenBatch]:
        """Return the micro-batches of one optimizer step with the contexts that the model is to read.

        Collective: every rank must call this, because the method may ask the policy.
        """
        return batches


class RoundMethod(Method):
    """Draws the contexts of the whole data set at the start of each round, with the weights of that moment.

    A round lasts `selfgen.epochs_per_round` epochs of the data set; rounds count from 0.
    """

    has_rounds: ClassVar[bool] = True

    def __init__(self, config: SelfgenConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.longest = plan.max_length
        """Tokens of the longest row that the method has the model read or generate."""

    def as_round_method(self) -> RoundMethod:
        return self

    def round_of(self, step: int) -> int:
        """Return the round of an optimizer step."""
        return step * self.plan.step_size // (self.config.epochs_per_round * self.plan.epoch_size)

    def first_step(self, number: int) -> int:
        """Return the first optimizer step of a round."""
        return -(-number * self.config.epochs_per_round * self.plan.epoch_size // self.plan.step_size)

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        return self.round_of(self.plan.total_steps - 1) + 1

    def rows(self, samples: list[TrainingRow], policy: Policy, number: int) -> tuple[list[TrainingRow], dict[str, int]]:
        """Draw the rows that a round trains on instead of some samples.

        Collective: every rank must call this, because the method asks the policy.

        Args:
            samples: Some rows of the data set; none on a rank that has nothing left to draw.
            number: The round.

        Returns:
            The rows, in the order of the samples, and counts for the record of the round. The counts of all calls
            are added up, except for `passes`, whose largest value counts.
        """
        raise NotImplementedError

    def select(self, sample_ids: np.ndarray, equal: np.ndarray, number: int) -> np.ndarray:
        """Choose the rows of a source that the round trains on.

        A method that leaves rows out must set `keeps_rows = False`.

        Args:
            sample_ids: `[rows]` int64.
            equal: `[rows]` bool: whether the model's answer is the reference.
            number: The round.

        Returns:
            Numbers of rows, ascending int64.
        """
        return np.arange(len(sample_ids))


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt that a round needs an answer to."""

    sample_id: int
    draw: int
    """Number of the answer among the answers to this sample, from 0."""
    prompt_ids: list[int]


class AnswerMethod(RoundMethod):
    """Makes the rows of a round from whole answers of the model, and asks the model for nothing else.

    An inference engine can therefore give the answers in the place of the policy (`selfgen.generate_command`).
    """

    def __init__(self, config: SelfgenConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.max_new_tokens = config.max_new_tokens or plan.max_length
        """Most tokens of an answer. If the setting is not given, `check` takes the length of the longest reference."""

    def check(self, samples: list[Samples]) -> None:
        prompts, responses = map(np.concatenate, zip(*(source.part_lengths() for source in samples), strict=True))
        self.max_new_tokens = self.config.max_new_tokens or int(responses.max())
        self.longest = int(prompts.max()) + self.max_new_tokens

    def rows(self, samples: list[TrainingRow], policy: Policy, number: int) -> tuple[list[TrainingRow], dict[str, int]]:
        questions = self.questions(samples, number)
        noise = self.noise(questions, number)
        answers = policy.complete([question.prompt_ids for question in questions], self.max_new_tokens, noise)
        return self.rows_of(samples, answers, number)

    def questions(self, samples: list[TrainingRow], number: int) -> list[Question]:
        """Return the prompts that a round needs answers to, in the order of the samples.

        Args:
            samples: Some rows of the data set.
            number: The round.
        """
        raise NotImplementedError

    def noise(self, questions: list[Question], number: int) -> AnswerNoise:
        """Return the noise with which the policy draws the answers to some questions."""
        raise NotImplementedError

    def rows_of(
        self, samples: list[TrainingRow], answers: list[list[int]], number: int
    ) -> tuple[list[TrainingRow], dict[str, int]]:
        """Return the rows that a round trains on instead of some samples, and counts, as `rows` does.

        Args:
            answers: Token ids of the answers to `questions(samples, number)`, each up to and with its end token.
        """
        raise NotImplementedError
