"""The controls: noise in the places of the model's tokens, and training on the model's own answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from selfgen_ds.config import SelfgenConfig
from selfgen_ds.methods.method import AnswerNoise, Policy
from selfgen_ds.methods.noise import Noise, other_than
from selfgen_ds.methods.own_samples import OwnSamples
from selfgen_ds.methods.scheduled_sampling import ScheduledSampling
from tests.batches import padded, sample
from tests.plans import plan
from tests.unit.test_mixture import StickyPolicy

FREQUENCIES = torch.tensor([4.0, 0.0, 2.0, 2.0], dtype=torch.float64)


def test_other_tokens_are_drawn_by_their_frequencies_and_never_the_target() -> None:
    """Each target's distribution is that of the frequencies without it, so a grid of uniforms gives its shares."""
    uniforms = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    for target, expected in {0: [0, 0, 400, 400], 2: [1600 / 3, 0, 0, 800 / 3], 3: [1600 / 3, 0, 800 / 3, 0]}.items():
        drawn = other_than(torch.full((800,), target), FREQUENCIES, uniforms)
        counts = torch.bincount(drawn, minlength=4).tolist()
        assert counts == pytest.approx(expected, abs=1)


def _contexts(method: type[ScheduledSampling], **settings: Any) -> tuple[Any, Any]:
    batch = padded([[1, 2]] * 8, [[5 + i % 3 for i in range(20)]] * 8, list(range(8)))
    made = method(SelfgenConfig(replace_probability=0.5, **settings), plan(seed=1, total_steps=10))
    if isinstance(made, Noise):
        made.frequencies = torch.tensor([0.0] * 5 + [3.0, 2.0, 1.0], dtype=torch.float64)
    (read,) = made.contexts([batch], StickyPolicy(), 0)
    return batch, read


def test_noise_differs_from_the_reference_where_the_models_tokens_do_and_nowhere_else() -> None:
    (_, own), (batch, noise) = _contexts(ScheduledSampling), _contexts(Noise)
    differs = [read.context_ids != read.target_ids for read in (own, noise)]
    assert differs[0].any()
    assert torch.equal(*differs)
    assert torch.equal(noise.replaced_mask, own.replaced_mask)
    assert torch.equal(noise.target_ids, batch.target_ids)
    tokens = noise.context_ids[differs[1]]
    assert set(tokens.tolist()) <= {5, 6, 7}, "only tokens of the responses"
    assert not torch.equal(tokens, own.context_ids[differs[0]])


class Echo(Policy):
    """Answers with the prompt backwards and an end token, 9."""

    def complete(
        self, prompts: list[list[int]], max_new_tokens: int, noise: AnswerNoise | None = None
    ) -> list[list[int]]:
        assert noise is not None
        uniforms: Tensor = noise(torch.arange(len(prompts)), torch.zeros(len(prompts), dtype=torch.int64))
        assert len(set(uniforms.tolist())) == len(prompts)
        return [[*reversed(prompt), 9][:max_new_tokens] for prompt in prompts]


def test_own_samples_are_context_and_target_alike() -> None:
    method = OwnSamples(SelfgenConfig(method="own_samples", max_new_tokens=3), plan(max_length=5))
    samples = [sample([1, 2], [7, 9], 4), sample([3, 4, 5], [9], 5)]
    rows, counts = method.rows(samples, Echo(), 0)
    assert counts == {"answers": 2}
    assert [row.context_ids.tolist() for row in rows] == [[1, 2, 2, 1, 9], [3, 4, 5, 5, 4]]
    for row, start in zip(rows, (2, 3), strict=True):
        assert np.array_equal(row.context_ids, row.target_ids)
        assert row.loss_mask.tolist() == [i >= start for i in range(5)]
    assert [row.sample_id for row in rows] == [4, 5]
