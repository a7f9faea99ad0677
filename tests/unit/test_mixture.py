import math

import pytest
import torch
from torch import Tensor

from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.methods.mixture import mix, replacement_mask

SEED, STEP = 5, 9


class NoisePolicy:
    """Draws 1000 and more: never a reference token, a function of the noise alone."""

    def draw(self, contexts: list[Tensor], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        return [1000 + (u * 1e6).long() for u in uniforms]


class SuccessorPolicy:
    """Draws the token before, plus one. Keeps what it was given."""

    def __init__(self) -> None:
        self.contexts: list[list[Tensor]] = []

    def draw(self, contexts: list[Tensor], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        self.contexts.append(contexts)
        return [c.roll(1, dims=1)[m] + 1 for c, m in zip(contexts, masks, strict=True)]


class RecordingPolicy(NoisePolicy):
    """Keeps the noise that it was given."""

    def draw(self, contexts: list[Tensor], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        self.uniforms = uniforms
        return super().draw(contexts, masks, uniforms)


def _random_window(seed: int) -> list[TokenBatch]:
    """Three micro-batches of rows of random lengths, ids below 100; the last one is without rows."""
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int) -> list[int]:
        length = int(torch.randint(least, 12, (), generator=generator))
        return torch.randint(100, (length,), generator=generator).tolist()

    window = []
    for micro in range(2):
        prompts, responses = [ids(1) for _ in range(5)], [ids(1) for _ in range(5)]
        window.append(collate(prompts, responses, [100 * seed + 5 * micro + row for row in range(5)]))
    return [*window, collate([], [], [])]


def _masks(window: list[TokenBatch], p: float, step: int = STEP) -> list[Tensor]:
    return [replacement_mask(batch, p, SEED, step) for batch in window]


PROBABILITIES = pytest.mark.parametrize("p", [0.0, 0.3, 1.0])


@PROBABILITIES
def test_masked_tokens_are_the_policys_and_all_others_the_references(p: float) -> None:
    for seed in range(20):
        window = _random_window(seed)
        masks = _masks(window, p)
        for before, mask, after in zip(window, masks, mix(window, NoisePolicy(), masks, 1, SEED, STEP), strict=True):
            assert torch.equal(after.context >= 1000, mask)
            assert torch.equal(after.context[~mask], before.target[~mask])


@PROBABILITIES
def test_drawn_says_where_the_context_holds_a_drawn_token(p: float) -> None:
    window = _random_window(1)
    masks = _masks(window, p)
    for mask, after in zip(masks, mix(window, NoisePolicy(), masks, 1, SEED, STEP), strict=True):
        assert torch.equal(after.drawn, mask)


@PROBABILITIES
def test_only_context_and_drawn_change(p: float) -> None:
    window = _random_window(2)
    for before, after in zip(window, mix(window, NoisePolicy(), _masks(window, p), 2, SEED, STEP), strict=True):
        for name in ("sample_ids", "lengths", "target", "loss_mask", "replaceable"):
            assert torch.equal(getattr(after, name), getattr(before, name))


def test_the_window_given_is_left_as_it_was() -> None:
    window, same = _random_window(3), _random_window(3)
    mix(window, NoisePolicy(), _masks(window, 1.0), 1, SEED, STEP)
    for batch, expected in zip(window, same, strict=True):
        assert torch.equal(batch.context, expected.context)
        assert torch.equal(batch.target, expected.target)


@PROBABILITIES
def test_prompt_padding_and_the_last_response_token_are_never_replaced(p: float) -> None:
    for seed in range(100):
        for batch in _random_window(seed):
            mask = replacement_mask(batch, p, SEED, STEP)
            last = torch.arange(mask.shape[1]) == batch.lengths[:, None] - 1
            assert not (mask & ~batch.loss_mask).any()
            assert not (mask & last).any()


def test_a_probability_of_0_replaces_nothing() -> None:
    assert not any(mask.any() for seed in range(100) for mask in _masks(_random_window(seed), 0.0))


def test_a_probability_of_1_replaces_every_replaceable_token() -> None:
    for seed in range(100):
        window = _random_window(seed)
        for batch, mask in zip(window, _masks(window, 1.0), strict=True):
            assert torch.equal(mask, batch.replaceable)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
def test_the_share_replaced_is_the_probability(p: float) -> None:
    batch = collate([[1]] * 400, [[2] * 501] * 400, list(range(400)))  # 200 000 replaceable tokens
    share = float(replacement_mask(batch, p, SEED, STEP).sum() / batch.replaceable.sum())
    assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 200_000))


def test_a_token_replaced_at_one_probability_is_replaced_at_a_higher_one() -> None:
    batch = _random_window(4)[0]
    lower, higher = (replacement_mask(batch, p, SEED, STEP) for p in (0.3, 0.6))
    assert torch.equal(lower & higher, lower)


def test_each_pass_reads_the_contexts_of_the_pass_before() -> None:
    batch = collate([[7]], [[50, 50, 50, 50, 50]], [0])
    policy = SuccessorPolicy()
    (mixed,) = mix([batch], policy, [batch.replaceable], 3, SEED, STEP)
    assert [contexts[0][0].tolist() for contexts in policy.contexts] == [
        [7, 50, 50, 50, 50, 50],
        [7, 8, 51, 51, 51, 50],
        [7, 8, 9, 52, 52, 50],
    ]
    assert mixed.context[0].tolist() == [7, 8, 9, 10, 53, 50]


def test_as_many_passes_as_masked_tokens_give_the_sequential_draw() -> None:
    window = _random_window(5)
    masks = _masks(window, 0.5)
    longest = max(int(mask.sum(dim=1).max()) for mask in masks)
    mixed = mix(window, SuccessorPolicy(), masks, longest, SEED, STEP)
    for before, mask, after in zip(window, masks, mixed, strict=True):
        expected = before.target.clone()
        for row, position in mask.nonzero().tolist():
            expected[row, position] = expected[row, position - 1] + 1
        assert torch.equal(after.context, expected)


def test_every_pass_has_the_same_noise() -> None:
    window = _random_window(6)
    masks = _masks(window, 0.5)
    once, thrice = (mix(window, NoisePolicy(), masks, passes, SEED, STEP) for passes in (1, 3))
    for a, b in zip(once, thrice, strict=True):
        assert torch.equal(a.context, b.context)


def test_a_draw_equal_to_the_reference_leaves_the_context_as_it_was() -> None:
    window = [collate([[7]], [[8, 9, 10, 11]], [0])]
    (mixed,) = mix(window, SuccessorPolicy(), _masks(window, 1.0), 1, SEED, STEP)
    assert torch.equal(mixed.context, mixed.target)


PROMPT, RESPONSE = [1, 2], list(range(20, 60))


def _alone() -> TokenBatch:
    return collate([PROMPT], [RESPONSE], [77])


def _in_company() -> TokenBatch:
    """The same sample in the last row, behind shorter and longer ones."""
    return collate([[3], [4] * 60, PROMPT], [[5] * 9, [6] * 80, RESPONSE], [1, 2, 77])


def test_a_samples_mask_depends_neither_on_its_row_nor_on_the_padding() -> None:
    alone, company = (replacement_mask(batch, 0.5, SEED, STEP) for batch in (_alone(), _in_company()))
    assert torch.equal(alone[0], company[2, :42])


def test_a_samples_draws_depend_neither_on_row_nor_padding_nor_micro_batch() -> None:
    (alone,) = mix([_alone()], NoisePolicy(), _masks([_alone()], 0.5), 1, SEED, STEP)
    window = [_random_window(7)[0], _in_company()]
    company = mix(window, NoisePolicy(), _masks(window, 0.5), 1, SEED, STEP)[1]
    assert torch.equal(alone.context[0], company.context[2, :42])


def test_a_draws_noise_does_not_depend_on_which_other_tokens_are_masked() -> None:
    batch = _alone()
    few, all_of_them = _masks([batch], 0.2)[0], batch.replaceable
    (a,) = mix([batch], NoisePolicy(), [few], 1, SEED, STEP)
    (b,) = mix([batch], NoisePolicy(), [all_of_them], 1, SEED, STEP)
    assert torch.equal(a.context[few], b.context[few])


def test_masks_differ_between_steps_seeds_and_samples() -> None:
    batch, other = _alone(), collate([PROMPT], [RESPONSE], [78])
    masks = [
        replacement_mask(batch, 0.5, SEED, STEP),
        replacement_mask(batch, 0.5, SEED, STEP + 1),
        replacement_mask(batch, 0.5, SEED + 1, STEP),
        replacement_mask(other, 0.5, SEED, STEP),
    ]
    assert len({tuple(mask[0].tolist()) for mask in masks}) == 4


def test_draws_differ_between_steps_seeds_and_samples() -> None:
    batch, other = _alone(), collate([PROMPT], [RESPONSE], [78])
    mixed = [
        mix([b], NoisePolicy(), [b.replaceable], 1, seed, step)[0]
        for b, seed, step in [
            (batch, SEED, STEP),
            (batch, SEED, STEP + 1),
            (batch, SEED + 1, STEP),
            (other, SEED, STEP),
        ]
    ]
    assert len({tuple(m.context[0].tolist()) for m in mixed}) == 4


def test_the_noise_of_a_draw_is_independent_of_the_coin_that_chose_it() -> None:
    batch = collate([[1]] * 200, [[2] * 501] * 200, list(range(200)))
    policy = RecordingPolicy()
    mix([batch], policy, _masks([batch], 0.1), 1, SEED, STEP)
    (uniforms,) = policy.uniforms  # were it the coin, they would be below 0.1
    assert float(uniforms.mean()) == pytest.approx(0.5, abs=5 / math.sqrt(12 * len(uniforms)))


def test_a_window_has_one_noise_a_masked_token() -> None:
    window = _random_window(8)
    masks = _masks(window, 0.4)
    policy = RecordingPolicy()
    mix(window, policy, masks, 1, SEED, STEP)
    assert [len(u) for u in policy.uniforms] == [int(mask.sum()) for mask in masks]
