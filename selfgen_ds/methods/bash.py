"""`bash`: Batch-Scheduled Sampling (Cen et al., TMLR 2025, arXiv 2410.14655).

The contexts are the mixture of `selfgen_ds.methods.mixture`, drawn for the whole data set at the start of each round r:

    c_t = y_t where M_t = 0,    c_t ~ p_theta_r( . | c_<t ) where M_t = 1,    M_t ~ Bernoulli(p_r)

With p = 1 the context is the model's answer at the length of the reference.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from selfgen_ds import hashing
from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.methods import schedule
from selfgen_ds.methods.method import ROUNDS, Plan, Policy, RoundMethod
from selfgen_ds.methods.mixture import MIXTURE, mask_of, mix, restore_reference_from
from selfgen_ds.methods.reject import first_rejected, load_reject


class Bash(RoundMethod):
    """Mixes the contexts of a round; the target stays the reference: `loss = - sum_t log p(y_t | c_<t)`."""

    settings: ClassVar[frozenset[str]] = MIXTURE | ROUNDS

    def __init__(self, config: SelfgenConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.rejected = load_reject(config.reject)

    def replace_probability(self, step: int) -> float:
        number = self.round_of(step)
        # The first round draws too.
        return self.scale * schedule.replace_probability(self.config, number, self.rounds, number + 1)

    def rows(self, samples: list[TrainingRow], policy: Policy, number: int) -> tuple[list[TrainingRow], dict[str, int]]:
        c, seed, p = self.config, self.plan.seed, self.replace_probability(self.first_step(number))
        order = sorted(range(len(samples)), key=lambda i: len(samples[i]))  # rows of similar length save padding
        size = self.plan.micro_batch_size
        groups = [order[i : i + size] for i in range(0, len(order), size)] or [[]]
        batches = [collate([[samples[i]] for i in group]) for group in groups]
        masks = [mask_of(c, batch, p, (hashing.ROUND_REPLACE, seed, number)) for batch in batches]
        keys = (hashing.ROUND_DRAW, seed, number)
        limits = c.max_differing_share, c.max_differing_tokens
        batches, passes = mix(batches, policy, masks, c.passes or "exact", keys, *limits)
        rows: dict[int, TrainingRow] = {}
        counts = {"rejected_tokens": 0, "rejected_rows": 0}
        for batch, group in zip(batches, groups, strict=True):
            accepted = self._accepted(batch)
            rejected = batch.replaced_mask & ~accepted.replaced_mask
            counts["rejected_tokens"] += int(rejected.sum())
            counts["rejected_rows"] += int(rejected.any(dim=1).sum())
            for row, i in enumerate(group):
                real = slice(len(samples[i]))
                context, replaced = accepted.context_ids[row, real], accepted.replaced_mask[row, real]
                rows[i] = replace(samples[i], context_ids=context.numpy(), replaced_mask=replaced.numpy())
        return [rows[i] for i in range(len(samples))], counts | {"passes": passes}

    def _accepted(self, batch: TokenBatch) -> TokenBatch:
        """Return a batch without rejected draws.

        The reference that follows a stopped draw can complete a rejected span with the draws before it, so that the
        text is searched again until nothing is rejected.
        """
        while (marked := self._rejected(batch)).any():
            batch = restore_reference_from(batch, marked)
        return batch

    def _rejected(self, batch: TokenBatch) -> Tensor:
        """Mark the first differing token of each answer that lies in a rejected span: `[batch, length]` bool."""
        marked = torch.zeros_like(batch.replaced_mask)
        if self.config.reject is None:
            return marked
        differing = batch.replaced_mask & (batch.context_ids != batch.target_ids)
        for row in differing.any(dim=1).nonzero().flatten().tolist():
            columns = batch.replaceable_mask[row].nonzero().flatten()
            for answer in columns.tensor_split((columns.diff() > 1).nonzero().flatten() + 1):
                ids, candidates = batch.context_ids[row][answer].tolist(), differing[row][answer].nonzero().flatten()
                first = first_rejected(ids, candidates.tolist(), self.rejected, self.plan.tokenizer)
                if first is not None:
                    marked[row, answer[first]] = True
        return marked
