from typing import Any

import pytest
import torch

from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods.scheduled_sampling import ScheduledSampling
from tests.batches import padded
from tests.plans import plan
from tests.unit.test_mixture import CountingPolicy, StickyPolicy


def method(**settings: Any) -> ScheduledSampling:
    return ScheduledSampling(SelfgenConfig(**settings), plan(seed=1, total_steps=10))


def batch() -> TokenBatch:
    return padded([[1, 2]] * 8, [list(range(20, 60))] * 8, list(range(8)))


@pytest.mark.parametrize(("passes", "made"), [(None, 1), (1, 1), (2, 2), ("exact", 40 - 1)])
def test_a_step_tells_how_many_passes_it_took(passes: Any, made: int) -> None:
    mixing = method(replace_probability=1.0, passes=passes)
    mixing.contexts([batch()], CountingPolicy(), 0)  # every draw of this policy changes all later draws
    assert mixing.passes == made


def test_a_step_at_probability_0_takes_no_pass() -> None:
    mixing = method(schedule="linear", passes="exact")
    mixing.passes = 7
    policy = CountingPolicy()
    (read,) = mixing.contexts([batch()], policy, 0)  # the schedule starts at 0
    assert mixing.passes == len(policy.calls) == 0
    assert torch.equal(read.context_ids, read.target_ids)
    mixing.contexts([batch()], policy, 9)
    assert mixing.passes > 1


def test_early_and_late_put_the_draws_where_they_say() -> None:
    def drawn(position: str) -> float:
        (read,) = method(replace_probability=1.0, position=position).contexts([batch()], StickyPolicy(), 0)
        return float(read.position_ids[read.replaced_mask].double().mean())

    assert drawn("early") < drawn("even") - 3 < drawn("late") - 6


def test_the_largest_share_of_differing_tokens_is_kept() -> None:
    (free,) = method(replace_probability=1.0, passes="exact").contexts([batch()], StickyPolicy(), 0)
    (capped,) = method(replace_probability=1.0, passes="exact", max_differing_share=0.1).contexts(
        [batch()], StickyPolicy(), 0
    )
    counts = [(read.context_ids != read.target_ids).sum(dim=1) for read in (free, capped)]
    assert int(counts[0].max()) > 4
    assert torch.equal(counts[1], counts[0].clamp(max=4))
