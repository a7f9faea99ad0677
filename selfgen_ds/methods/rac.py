"""`rac`: Reference-Answer-based Correction (Cen et al., TMLR 2025, arXiv 2410.14655).

The model reads its answer a to a prompt x and learns to correct the answer to the reference y:

    c = x + a + cue + y,    a ~ p_theta( . | x ) at the round's start,    loss = - sum_t log p( y_t | x, a, cue, y_<t )

The loss falls on the reference alone. A share of the samples (`selfgen.sft_share`) is trained on as it is, so that the
model does not forget how to answer directly.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from selfgen_ds import hashing
from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.samples import Samples
from selfgen_ds.errors import InputError
from selfgen_ds.methods.method import ANSWERS, ROUNDS, SAMPLING, AnswerMethod, AnswerNoise, Plan, Question
from selfgen_ds.methods.reject import first_rejected, load_reject

log = logging.getLogger("selfgen_ds")


class Rac(AnswerMethod):
    """Turns a sample into `answers_per_prompt` corrections, each of another answer, or leaves the sample as it is."""

    settings: ClassVar[frozenset[str]] = (
        SAMPLING | ROUNDS | ANSWERS | {"answers_per_prompt", "sft_share", "cue", "max_equal_share"}
    )
    keeps_rows: ClassVar[bool] = False

    def __init__(self, config: SelfgenConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.rejected = load_reject(config.reject)
        self._between = len(plan.correction.closing_ids) + len(plan.correction.cue_ids)

    def check(self, samples: list[Samples]) -> None:
        super().check(samples)
        prompts, responses = map(np.concatenate, zip(*(source.part_lengths() for source in samples), strict=True))
        room = self.plan.max_length - prompts - responses - self._between
        if self.config.sft_share < 1 and room.max() < (self.config.max_new_tokens or 1):
            setting = "data.max_length" if self.config.max_new_tokens is None else "selfgen.max_new_tokens"
            raise InputError(
                f"{setting}: an answer of {self.config.max_new_tokens or 1} tokens fits into no row "
                f"of data.max_length={self.plan.max_length}: prompt, cue and reference take "
                f"{self.plan.max_length - room.max()} tokens or more"
            )
        self._warn(room)

    def _warn(self, room: np.ndarray) -> None:
        """Warn of answers that are not read, not drawn, or cut; `room` is the number of tokens left in each row."""
        epochs, answers, most = self.config.epochs_per_round, self.config.answers_per_prompt, self.config.max_new_tokens
        if answers > epochs and self.config.sft_share < 1:
            told = "rac: a round of %d epochs reads about %d of the %d answers to each prompt"
            log.warning(told, epochs, epochs, answers)
        if full := int((room < 1).sum()):
            told = "rac: %d of %d rows have no room for the model's answer and are trained without one"
            log.warning(told, full, len(room))
        if most and (little := int((room < most).sum()) - full):
            log.warning("rac: answers to %d of %d rows are cut before selfgen.max_new_tokens", little, len(room))

    def questions(self, samples: list[TrainingRow], number: int) -> list[Question]:
        return [
            Question(sample_id=sample.sample_id, draw=draw, prompt_ids=sample.prompt_ids.tolist())
            for sample, is_corrected in zip(samples, self._corrected(samples, number), strict=True)
            if is_corrected and self._room(sample) > 0
            for draw in range(self.config.answers_per_prompt)
        ]

    def noise(self, questions: list[Question], number: int) -> AnswerNoise:
        keys = torch.tensor([(q.sample_id, q.draw) for q in questions], dtype=torch.int64).reshape(-1, 2)

        def noise(prompts: Tensor, positions: Tensor) -> Tensor:
            sample_ids, draws = keys[prompts].unbind(dim=1)
            return hashing.uniform(hashing.ANSWER, self.plan.seed, number, sample_ids, draws, positions)

        return noise

    def rows_of(
        self, samples: list[TrainingRow], answers: list[list[int]], number: int
    ) -> tuple[list[TrainingRow], dict[str, int]]:
        by_sample: dict[int, list[list[int]]] = {}
        for question, answer in zip(self.questions(samples, number), answers, strict=True):
            by_sample.setdefault(question.sample_id, []).append(self.plan.correction.content(answer))
        ends = self.plan.correction.end_tokens
        counts = {
            "answers": len(answers),
            "unfinished_answers": sum(not answer or answer[-1] not in ends for answer in answers),
            "rejected_answers": 0,
            "cut_answers": 0,
            "no_room": 0,
        }
        rows = []
        for sample, is_corrected in zip(samples, self._corrected(samples, number), strict=True):
            counts["no_room"] += is_corrected and sample.sample_id not in by_sample
            own = by_sample.get(sample.sample_id, [])
            corrections = [self._correction(sample, answer, counts) for answer in own]
            plain = replace(sample, replaceable_mask=np.zeros(len(sample), bool))
            rows += [row for row in corrections if row is not None] or [plain]
        return rows, counts

    def _corrected(self, samples: list[TrainingRow], number: int) -> list[bool]:
        """Return for each sample whether the round has corrections of it, rather than the sample as it is."""
        ids = torch.tensor([sample.sample_id for sample in samples], dtype=torch.int64)
        return (hashing.uniform(hashing.SFT_SHARE, self.plan.seed, number, ids) >= self.config.sft_share).tolist()

    def _room(self, sample: TrainingRow) -> int:
        """Return the tokens that an answer may take, with the cue and the reference after it."""
        return self.plan.max_length - len(sample.prompt_ids) - len(sample.response_ids) - self._between

    def _correction(self, sample: TrainingRow, answer: list[int], counts: dict[str, int]) -> TrainingRow | None:
        """Return the row that corrects an answer, or None if the answer is rejected."""
        if first_rejected(answer, list(range(len(answer))), self.rejected, self.plan.tokenizer) is not None:
            counts["rejected_answers"] += 1
            return None
        equal = self._text(answer) == self._text(self.plan.correction.content(sample.response_ids.tolist()))
        room = self._room(sample)
        counts["cut_answers"] += len(answer) > room
        answer = answer[:room]
        before = self.plan.correction.prompt(sample.prompt_ids.tolist(), answer)
        context = np.array([*before, *sample.response_ids])
        positions = np.arange(len(context))
        first = len(sample.prompt_ids)
        return TrainingRow(
            sample_id=sample.sample_id,
            context_ids=context,
            target_ids=context,
            loss_mask=positions >= len(before),
            replaceable_mask=np.zeros(len(context), bool),
            replaced_mask=(positions >= first) & (positions < first + len(answer)),
            answer_equal=equal,
        )

    def _text(self, ids: list[int]) -> str:
        return self.plan.tokenizer.decode(ids, skip_special_tokens=True)

    def select(self, sample_ids: np.ndarray, equal: np.ndarray, number: int) -> np.ndarray:
        others = int((~equal).sum())
        share = self.config.max_equal_share
        # In floating point, 0.12 * 22 / 0.88 is less than 3.
        kept = len(equal) if share == 1 else int(share * others / (1 - share) + 1e-9)
        ids = torch.from_numpy(sample_ids[equal])
        order = hashing.uniform(hashing.SFT_SHARE, self.plan.seed, number, ids, 1).numpy()
        some = np.flatnonzero(equal)[np.argsort(order, kind="stable")[:kept]]
        return np.sort(np.concatenate([np.flatnonzero(~equal), some]))
