"""For any batch and any settings, the model learns the reference, whatever tokens it reads."""

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfgen_ds import methods
from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.methods.method import Policy
from tests.plans import plan
from tests.tiers import sweep

DRAWN = 1000  # ids of 1000 and more are drawn


class MarkingPolicy(Policy):
    """Draws the reference token or a token that no reference holds, depending on noise and prefix."""

    def draw(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        return [self._draw(*values) for values in zip(batches, masks, uniforms, strict=True)]

    def _draw(self, batch: TokenBatch, mask: Tensor, uniforms: Tensor) -> Tensor:
        before = batch.context_ids.roll(1, dims=1)[mask]
        kept = uniforms * (1 + before % 3) < 0.6
        return torch.where(kept, batch.target_ids[mask], DRAWN + before % 50)


@st.composite
def samples(draw: Callable, sample_id: int) -> TrainingRow:
    """Draw a sample of a prompt and up to three turns, with other tokens between the turns."""
    length, turns = draw(st.integers(1, 4)), []
    for _ in range(draw(st.integers(1, 3))):
        answer, closing, between = (draw(st.integers(0, most)) for most in (9, 2, 3))
        turns.append([length, length + answer, length + answer + closing])
        length += answer + closing + between
    # the last token is never replaceable
    return TrainingRow.reference(sample_id, np.arange(length + 1) % 97, np.array(turns))


@st.composite
def batch_lists(draw: Callable) -> list[TokenBatch]:
    batches: list[TokenBatch] = []
    sample_id = 0
    packed = draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        rows: list[list[TrainingRow]] = []
        for _ in range(draw(st.integers(0, 3))):
            rows.append([])
            for _ in range(draw(st.integers(1, 3)) if packed else 1):
                rows[-1].append(draw(samples(sample_id)))
                sample_id += 1
        batches.append(collate(rows, packed=packed))
    return batches


CONFIGS = st.builds(
    SelfgenConfig,
    replace_probability=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    schedule=st.sampled_from(["constant", "linear", "exponential", "inverse_sigmoid"]),
    position=st.sampled_from(["even", "early", "late"]),
    passes=st.sampled_from([None, 1, 2, 5, "exact"]),
    max_differing_share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    drawn_context_weight=st.sampled_from([0.0, 1.0, 2.0]),
)


@sweep("name", ["scheduled_sampling", "sft"])
@settings(max_examples=60, deadline=None)
@given(batches=batch_lists(), config=CONFIGS, seed=st.integers(0, 2**31 - 1), step=st.integers(0, 99))
def test_no_target_is_ever_a_drawn_token(
    name: str, batches: list[TokenBatch], config: SelfgenConfig, seed: int, step: int
) -> None:
    method = methods.find(name)(config, plan(seed=seed, total_steps=100))
    read = method.contexts(batches, MarkingPolicy(), step)
    for before, after in zip(batches, read, strict=True):
        assert (after.target_ids[after.loss_mask] < DRAWN).all()
        for unchanged in ("target_ids", "loss_mask", "replaceable_mask", "sample_ids", "position_ids"):
            assert torch.equal(getattr(after, unchanged), getattr(before, unchanged))
        assert not (after.replaced_mask & ~after.replaceable_mask).any()
        assert torch.equal(after.context_ids[~after.replaced_mask], after.target_ids[~after.replaced_mask])
        for sample_id in after.sample_ids[after.sample_ids >= 0].unique():
            here = after.sample_ids == sample_id
            differing = (here & (after.context_ids != after.target_ids)).sum()
            assert differing <= config.max_differing_share * (here & after.loss_mask).sum() + 1e-6
