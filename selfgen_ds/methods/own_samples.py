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
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.methods.method import ANSWERS, ROUNDS, SAMPLING, AnswerMethod, AnswerNoise, Question


class OwnSamples(AnswerMethod):
    """Puts the model's answer to the last turn in the place of the reference."""

    settings: ClassVar[frozenset[str]] = (SAMPLING | ROUNDS | ANSWERS) - {"reject"}
    keeps_rows: ClassVar[bool] = False

    def questions(self, samples: list[TrainingRow], number: int) -> list[Question]:
        return [Question(sample_id=s.sample_id, draw=0, prompt_ids=s.prompt_ids.tolist()) for s in samples]

    def noise(self, questions: list[Question], number: int) -> AnswerNoise:
        ids = torch.tensor([question.sample_id for question in questions], dtype=torch.int64)

        def noise(prompts: Tensor, positions: Tensor) -> Tensor:
            return hashing.uniform(hashing.ANSWER, self.plan.seed, number, ids[prompts], positions)

        return noise

    def rows_of(
        self, samples: list[TrainingRow], answers: list[list[int]], number: int
    ) -> tuple[list[TrainingRow], dict[str, int]]:
        rows = [self._row(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
        return rows, {"answers": len(answers)}

    def _row(self, sample: TrainingRow, answer: list[int]) -> TrainingRow:
        start = len(sample.prompt_ids)
        ids = np.array([*sample.prompt_ids, *answer][: self.plan.max_length])
        return TrainingRow.reference(sample.sample_id, ids, np.array([[start, len(ids), len(ids)]]))
