"""`bash`: Batch-Scheduled Sampling (Cen et al., TMLR 2025, arXiv 2410.14655).

The mixture of `selfgen_ds.methods.mixture`, drawn offline for the whole data set at the start of each round r:

    c_t = y_t where M_t = 0,    c_t ~ p_theta_r( . | c_<t ) where M_t = 1,    M_t ~ Bernoulli(p_r)

With p = 1 it is the model's own answer, at the reference's length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from selfgen_ds import hashing
from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.samples import Sample
from selfgen_ds.data.stored_row import StoredRow
from selfgen_ds.methods import schedule
from selfgen_ds.methods.method import Plan, Policy, RoundMethod
from selfgen_ds.methods.mixture import MIXTURE, mix, replacement_mask, stop
from selfgen_ds.methods.reject import first_rejected, load_reject


class Bash(RoundMethod):
    """The target stays the reference: `loss = - sum_t log p(y_t | c_<t)`."""

    settings: ClassVar[frozenset[str]] = MIXTURE | {
        "epochs_per_round",
        "reject",
        "rollouts",
        "generation_batch_size",
    }

    def __init__(self, config: SelfgenConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.rejected = load_reject(config.reject)

    def replace_probability(self, step: int) -> float:
        c, rounds_done = self.config, self.round_of(step) + 1  # the first round draws too
        return schedule.replace_probability(
            c.schedule, c.replace_probability, c.schedule_share, rounds_done, self.rounds
        )

    def rows(self, samples: list[Sample], policy: Policy, number: int) -> tuple[list[StoredRow], dict[str, int]]:
        c, seed, p = self.config, self.plan.seed, self.replace_probability(self.first_step(number))
        order = sorted(range(len(samples)), key=lambda i: len(samples[i].input_ids))  # rows of similar length together
        size = self.plan.micro_batch_size
        groups = [order[i : i + size] for i in range(0, len(order), size)] or [[]]
        window = [collate([[samples[i]] for i in group]).to(policy.device) for group in groups]
        masks = [replacement_mask(batch, p, (hashing.ROUND_REPLACE, seed, number), c.position) for batch in window]
        draws = (hashing.ROUND_DRAW, seed, number)
        window, passes = mix(window, policy, masks, c.passes or "exact", draws, c.max_differing_share)
        rows: dict[int, StoredRow] = {}
        counts = {"rejected_tokens": 0, "rejected_rows": 0}
        for batch, group in zip(window, groups, strict=True):
            accepted = self._accepted(batch).to("cpu")
            back = batch.drawn.cpu() & ~accepted.drawn
            counts["rejected_tokens"] += int(back.sum())
            counts["rejected_rows"] += int(back.any(dim=1).sum())
            for place, i in enumerate(group):
                row = StoredRow.of(samples[i])
                length = len(row.target_ids)
                context, drawn = accepted.context[place, :length].numpy(), accepted.drawn[place, :length].numpy()
                rows[i] = replace(row, context_ids=context, replaced_mask=drawn)
        return [rows[i] for i in range(len(samples))], counts | {"passes": passes}

    def _accepted(self, batch: TokenBatch) -> TokenBatch:
        """A batch without rejected draws; what the reference makes of the draws before it may be rejected in turn."""
        while (marked := self._rejected(batch)).any():
            batch = stop(batch, marked)
        return batch

    def _rejected(self, batch: TokenBatch) -> Tensor:
        """`[batch, length]` bool: the first differing token of each answer that lies in a rejected span of it."""
        marked = torch.zeros_like(batch.drawn)
        if self.config.reject is None:
            return marked
        differing = batch.drawn & (batch.context != batch.target)
        for row in differing.any(dim=1).nonzero().flatten().tolist():
            places = batch.replaceable[row].nonzero().flatten()
            for answer in places.tensor_split((places.diff() > 1).nonzero().flatten().cpu() + 1):
                ids, candidates = batch.context[row][answer].tolist(), differing[row][answer].nonzero().flatten()
                found = first_rejected(ids, candidates.tolist(), self.rejected, self.plan.tokenizer)
                if found is not None:
                    marked[row, answer[found]] = True
        return marked
