"""`own_samples`: a control. The model is trained on its own answers, context and target alike.

This is self-distillation on samples (SSD, arXiv 2604.01193):

    a ~ p_theta_r( . | x ) at the round's start,    loss = - sum_t log p( a_t | x, a_<t )

No reference is learned from, so that a gain of it is no gain from correcting errors.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from selfgen_ds import hashing
from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.samples import Samples
from selfgen_ds.methods.method import ROUNDS, SAMPLING, Plan, Policy, RoundMethod


class OwnSamples(RoundMethod):
    """Puts the model's answer to the last turn in the place of the reference."""

    settings: ClassVar[frozenset[str]] = (SAMPLING | ROUNDS | {"max_new_tokens"}) - {"reject"}
    keeps_rows: ClassVar[bool] = False

    def __init__(self, config: SelfgenConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.max_new_tokens = config.max_new_tokens or plan.max_length
        """Most tokens of an answer. If the setting is not given, `check` takes the length of the longest reference."""

    def check(self, samples: list[Samples]) -> None:
        prompts, responses = map(np.concatenate, zip(*(source.part_lengths() for source in samples), strict=True))
        self.max_new_tokens = self.config.max_new_tokens or int(responses.max())
        self.longest = int(prompts.max()) + self.max_new_tokens

    def rows(self, samples: list[TrainingRow], policy: Policy, number: int) -> tuple[list[TrainingRow], dict[str, int]]:
        ids = torch.tensor([sample.sample_id for sample in samples], dtype=torch.int64)

        def noise(prompts: Tensor, positions: Tensor) -> Tensor:
            return hashing.uniform(hashing.ANSWER, self.plan.seed, number, ids[prompts], positions)

        prompts = [sample.prompt_ids.tolist() for sample in samples]
        answers = policy.complete(prompts, self.max_new_tokens, noise)
        rows = [self._row(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
        return rows, {"answers": len(answers)}

    def _row(self, sample: TrainingRow, answer: list[int]) -> TrainingRow:
        start = len(sample.prompt_ids)
        ids = np.array([*sample.prompt_ids, *answer][: self.plan.max_length])
        return TrainingRow.reference(sample.sample_id, ids, np.array([[start, len(ids), len(ids)]]))
