import math

import numpy as np
import pytest
import torch
from torch import Tensor

from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.packing import pack
from selfgen_ds.data.samples import Sample
from selfgen_ds.methods.method import Policy
from selfgen_ds.methods.mixture import mix, replacement_mask
from tests.batches import lengths, padded, sample

SEED, STEP = 5, 9


class NoisePolicy(Policy):
    """Draws 1000 and more: never a reference token, a function of the noise alone."""

    def draw(self, window: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        return [1000 + (u * 1e6).long() for u in uniforms]


class SuccessorPolicy(Policy):
    """Draws the token before, plus one. Keeps what it was given."""

    def __init__(self) -> None:
        self.contexts: list[list[Tensor]] = []

    def draw(self, window: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        self.contexts.append([batch.context for batch in window])
        return [c.roll(1, dims=1)[m] + 1 for c, m in zip(self.contexts[-1], masks, strict=True)]


class RecordingPolicy(NoisePolicy):
    """Keeps the noise that it was given."""

    def draw(self, window: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        self.uniforms = uniforms
        return super().draw(window, masks, uniforms)


def _random_window(seed: int) -> list[TokenBatch]:
    """Three micro-batches of rows of random lengths, ids below 100; the last one is without rows."""
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int) -> list[int]:
        length = int(torch.randint(least, 12, (), generator=generator))
        return torch.randint(100, (length,), generator=generator).tolist()

    window = []
    for micro in range(2):
        prompts, responses = [ids(1) for _ in range(5)], [ids(1) for _ in range(5)]
        window.append(padded(prompts, responses, [100 * seed + 5 * micro + row for row in range(5)]))
    return [*window, collate([])]


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
        for name in ("sample_ids", "position_ids", "target", "loss_mask", "replaceable"):
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
            last = torch.arange(mask.shape[1]) == torch.tensor(lengths(batch))[:, None] - 1
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
    batch = padded([[1]] * 400, [[2] * 501] * 400, list(range(400)))  # 200 000 replaceable tokens
    share = float(replacement_mask(batch, p, SEED, STEP).sum() / batch.replaceable.sum())
    assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 200_000))


def test_a_token_replaced_at_one_probability_is_replaced_at_a_higher_one() -> None:
    batch = _random_window(4)[0]
    lower, higher = (replacement_mask(batch, p, SEED, STEP) for p in (0.3, 0.6))
    assert torch.equal(lower & higher, lower)


def test_each_pass_reads_the_contexts_of_the_pass_before() -> None:
    batch = padded([[7]], [[50, 50, 50, 50, 50]], [0])
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
    window = [padded([[7]], [[8, 9, 10, 11]], [0])]
    (mixed,) = mix(window, SuccessorPolicy(), _masks(window, 1.0), 1, SEED, STEP)
    assert torch.equal(mixed.context, mixed.target)


PROMPT, RESPONSE = [1, 2], list(range(20, 60))


def _alone() -> TokenBatch:
    return padded([PROMPT], [RESPONSE], [77])


def _in_company() -> TokenBatch:
    """The same sample in the last row, behind shorter and longer ones."""
    return padded([[3], [4] * 60, PROMPT], [[5] * 9, [6] * 80, RESPONSE], [1, 2, 77])


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
    batch, other = _alone(), padded([PROMPT], [RESPONSE], [78])
    masks = [
        replacement_mask(batch, 0.5, SEED, STEP),
        replacement_mask(batch, 0.5, SEED, STEP + 1),
        replacement_mask(batch, 0.5, SEED + 1, STEP),
        replacement_mask(other, 0.5, SEED, STEP),
    ]
    assert len({tuple(mask[0].tolist()) for mask in masks}) == 4


def test_draws_differ_between_steps_seeds_and_samples() -> None:
    batch, other = _alone(), padded([PROMPT], [RESPONSE], [78])
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
    batch = padded([[1]] * 200, [[2] * 501] * 200, list(range(200)))
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


# --- packing ---


class PrefixPolicy(Policy):
    """Draws a function of the noise and of all that the sample's context holds before the token."""

    def draw(self, window: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        return [self._draw(*values) for values in zip(window, masks, uniforms, strict=True)]

    def _draw(self, batch: TokenBatch, mask: Tensor, uniforms: Tensor) -> Tensor:
        drawn = []
        for (row, column), noise in zip(mask.nonzero().tolist(), uniforms.tolist(), strict=True):
            first = column - int(batch.position_ids[row, column])
            assert batch.sample_ids[row, first:column].eq(batch.sample_ids[row, column]).all()
            drawn.append(hash((tuple(batch.context[row, first:column].tolist()), noise)) % 1000)
        return torch.tensor(drawn, dtype=torch.int64)


def _some_samples(count: int) -> list[Sample]:
    """Of random lengths up to 22; some with two turns."""
    generator = torch.Generator().manual_seed(11)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(100, (length,), generator=generator).tolist()

    samples = [sample(ids(12), ids(12), sample_id) for sample_id in range(count)]
    two_turns = Sample(sample_id=count, input_ids=np.arange(200, 220), turns=np.array([[3, 8, 9], [12, 16, 17]]))
    return [*samples, two_turns]


def _by_sample(window: list[TokenBatch], name: str) -> dict[int, list[int]]:
    """One tensor's values, sample by sample."""
    found: dict[int, list[int]] = {}
    for batch in window:
        for row, column in (batch.sample_ids >= 0).nonzero().tolist():
            value = getattr(batch, name)[row, column].item()
            found.setdefault(int(batch.sample_ids[row, column]), []).append(value)
    return found


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_a_packed_window_has_the_masks_and_draws_of_the_padded_one(p: float, passes: int) -> None:
    samples = _some_samples(24)
    rows = pack([len(s.input_ids) for s in samples], 40)
    packed = [collate([[samples[i] for i in row] for row in rows[k::2]], packed=True) for k in range(2)]
    alone = [collate([[s] for s in samples[k::5]]) for k in range(5)]
    mixed = {}
    for name, window in (("packed", packed), ("padded", alone)):
        mixed[name] = mix(window, PrefixPolicy(), _masks(window, p), passes, SEED, STEP)
    assert len(rows) < len(samples) / 2
    for field in ("drawn", "context", "target", "loss_mask", "replaceable", "position_ids"):
        assert _by_sample(mixed["packed"], field) == _by_sample(mixed["padded"], field)
    assert any(any(drawn) for drawn in _by_sample(mixed["packed"], "drawn").values())


def test_what_closes_a_turn_is_never_replaced_in_a_packed_row() -> None:
    samples = _some_samples(6)
    batch = collate([samples], packed=True)
    (mixed,) = mix([batch], NoisePolicy(), _masks([batch], 1.0), 1, SEED, STEP)
    context = _by_sample([mixed], "context")
    for s in samples:
        for start, replaceable, end in s.turns:
            assert all(token >= 1000 for token in context[s.sample_id][start:replaceable])
            assert context[s.sample_id][replaceable:end] == s.input_ids[replaceable:end].tolist()


def test_padding_of_packed_rows_is_never_replaced() -> None:
    batch = collate([_some_samples(6), _some_samples(1)], packed=True)
    (mixed,) = mix([batch], NoisePolicy(), _masks([batch], 1.0), 1, SEED, STEP)
    assert not mixed.context[batch.sample_ids < 0].any()
