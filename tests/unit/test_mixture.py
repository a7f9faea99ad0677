import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from selfgen_ds import hashing
from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.packing import pack
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.methods.method import Policy
from selfgen_ds.methods.mixture import Position, clean_rows, mask_of, mix, replacement_mask, restore_reference_from
from tests.batches import lengths, padded, sample
from tests.tiers import sweep

SEED, STEP = 5, 9
REPLACE, DRAW = (hashing.REPLACE, SEED, STEP), (hashing.DRAW, SEED, STEP)


class NoisePolicy(Policy):
    """Draws ids of 1000 and more, which no reference holds, as a function of the noise alone."""

    def draw(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        return [1000 + (u * 1e6).long() for u in uniforms]


class SuccessorPolicy(Policy):
    """Draws the token before, plus one, and keeps the contexts that it was given."""

    def __init__(self) -> None:
        self.contexts: list[list[Tensor]] = []

    def draw(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        self.contexts.append([batch.context_ids for batch in batches])
        return [c.roll(1, dims=1)[m] + 1 for c, m in zip(self.contexts[-1], masks, strict=True)]


class RecordingPolicy(NoisePolicy):
    """Keeps the noise that it was given."""

    def draw(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        self.uniforms = uniforms
        return super().draw(batches, masks, uniforms)


def _random_batches(seed: int) -> list[TokenBatch]:
    """Return three micro-batches of rows of random lengths and ids below 100; the last has no row."""
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int) -> list[int]:
        length = int(torch.randint(least, 12, (), generator=generator))
        return torch.randint(100, (length,), generator=generator).tolist()

    batches = []
    for micro in range(2):
        prompts, responses = [ids(1) for _ in range(5)], [ids(1) for _ in range(5)]
        batches.append(padded(prompts, responses, [100 * seed + 5 * micro + row for row in range(5)]))
    return [*batches, collate([])]


def mixture(batches: list[TokenBatch], policy: Policy, masks: list[Tensor], passes: int) -> list[TokenBatch]:
    return mix(batches, policy, masks, passes, DRAW)[0]


def _masks(batches: list[TokenBatch], p: float, step: int = STEP) -> list[Tensor]:
    return [replacement_mask(batch, p, (hashing.REPLACE, SEED, step)) for batch in batches]


PROBABILITIES = pytest.mark.parametrize("p", [0.0, 0.3, 1.0])


@PROBABILITIES
def test_masked_tokens_are_the_policys_and_all_others_the_references(p: float) -> None:
    for seed in range(5):
        batches = _random_batches(seed)
        masks = _masks(batches, p)
        for before, mask, after in zip(batches, masks, mixture(batches, NoisePolicy(), masks, 1), strict=True):
            assert torch.equal(after.context_ids >= 1000, mask)
            assert torch.equal(after.context_ids[~mask], before.target_ids[~mask])


@PROBABILITIES
def test_drawn_says_where_the_context_holds_a_drawn_token(p: float) -> None:
    batches = _random_batches(1)
    masks = _masks(batches, p)
    for mask, after in zip(masks, mixture(batches, NoisePolicy(), masks, 1), strict=True):
        assert torch.equal(after.replaced_mask, mask)


@PROBABILITIES
def test_only_context_and_drawn_change(p: float) -> None:
    batches = _random_batches(2)
    for before, after in zip(batches, mixture(batches, NoisePolicy(), _masks(batches, p), 2), strict=True):
        for name in ("sample_ids", "position_ids", "target_ids", "loss_mask", "replaceable_mask"):
            assert torch.equal(getattr(after, name), getattr(before, name))


def test_the_batches_given_are_left_as_they_were() -> None:
    batches, same = _random_batches(3), _random_batches(3)
    mixture(batches, NoisePolicy(), _masks(batches, 1.0), 1)
    for batch, expected in zip(batches, same, strict=True):
        assert torch.equal(batch.context_ids, expected.context_ids)
        assert torch.equal(batch.target_ids, expected.target_ids)


@PROBABILITIES
def test_prompt_padding_and_the_last_response_token_are_never_replaced(p: float) -> None:
    for seed in range(10):
        for batch in _random_batches(seed):
            mask = replacement_mask(batch, p, REPLACE)
            last = torch.arange(mask.shape[1]) == torch.tensor(lengths(batch))[:, None] - 1
            assert not (mask & ~batch.loss_mask).any()
            assert not (mask & last).any()


def test_a_probability_of_0_replaces_nothing() -> None:
    assert not any(mask.any() for seed in range(10) for mask in _masks(_random_batches(seed), 0.0))


def test_a_probability_of_1_replaces_every_replaceable_token() -> None:
    for seed in range(10):
        batches = _random_batches(seed)
        for batch, mask in zip(batches, _masks(batches, 1.0), strict=True):
            assert torch.equal(mask, batch.replaceable_mask)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
def test_the_share_replaced_is_the_probability(p: float) -> None:
    batch = padded([[1]] * 400, [[2] * 501] * 400, list(range(400)))  # 200 000 replaceable tokens
    share = float(replacement_mask(batch, p, REPLACE).sum() / batch.replaceable_mask.sum())
    assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 200_000))


def test_a_token_replaced_at_one_probability_is_replaced_at_a_higher_one() -> None:
    batch = _random_batches(4)[0]
    lower, higher = (replacement_mask(batch, p, REPLACE) for p in (0.3, 0.6))
    assert torch.equal(lower & higher, lower)


def test_each_pass_reads_the_contexts_of_the_pass_before() -> None:
    batch = padded([[7]], [[50, 50, 50, 50, 50]], [0])
    policy = SuccessorPolicy()
    (mixed,) = mixture([batch], policy, [batch.replaceable_mask], 3)
    assert [contexts[0][0].tolist() for contexts in policy.contexts] == [
        [7, 50, 50, 50, 50, 50],
        [7, 8, 51, 51, 51, 50],
        [7, 8, 9, 52, 52, 50],
    ]
    assert mixed.context_ids[0].tolist() == [7, 8, 9, 10, 53, 50]


def test_as_many_passes_as_masked_tokens_give_the_sequential_draw() -> None:
    batches = _random_batches(5)
    masks = _masks(batches, 0.5)
    longest = max(int(mask.sum(dim=1).max()) for mask in masks)
    mixed = mixture(batches, SuccessorPolicy(), masks, longest)
    for before, mask, after in zip(batches, masks, mixed, strict=True):
        expected = before.target_ids.clone()
        for row, position in mask.nonzero().tolist():
            expected[row, position] = expected[row, position - 1] + 1
        assert torch.equal(after.context_ids, expected)


def test_every_pass_has_the_same_noise() -> None:
    batches = _random_batches(6)
    masks = _masks(batches, 0.5)
    once, thrice = (mixture(batches, NoisePolicy(), masks, passes) for passes in (1, 3))
    for a, b in zip(once, thrice, strict=True):
        assert torch.equal(a.context_ids, b.context_ids)


def test_a_draw_equal_to_the_reference_leaves_the_context_as_it_was() -> None:
    batches = [padded([[7]], [[8, 9, 10, 11]], [0])]
    (mixed,) = mixture(batches, SuccessorPolicy(), _masks(batches, 1.0), 1)
    assert torch.equal(mixed.context_ids, mixed.target_ids)


PROMPT, RESPONSE = [1, 2], list(range(20, 60))


def _alone() -> TokenBatch:
    return padded([PROMPT], [RESPONSE], [77])


def _in_company() -> TokenBatch:
    """Return the same sample in the last row, after a shorter and a longer one."""
    return padded([[3], [4] * 60, PROMPT], [[5] * 9, [6] * 80, RESPONSE], [1, 2, 77])


def test_a_samples_mask_depends_neither_on_its_row_nor_on_the_padding() -> None:
    alone, company = (replacement_mask(batch, 0.5, REPLACE) for batch in (_alone(), _in_company()))
    assert torch.equal(alone[0], company[2, :42])


def test_a_samples_draws_depend_neither_on_row_nor_padding_nor_micro_batch() -> None:
    (alone,) = mixture([_alone()], NoisePolicy(), _masks([_alone()], 0.5), 1)
    batches = [_random_batches(7)[0], _in_company()]
    company = mixture(batches, NoisePolicy(), _masks(batches, 0.5), 1)[1]
    assert torch.equal(alone.context_ids[0], company.context_ids[2, :42])


def test_a_draws_noise_does_not_depend_on_which_other_tokens_are_masked() -> None:
    batch = _alone()
    few, all_of_them = _masks([batch], 0.2)[0], batch.replaceable_mask
    (a,) = mixture([batch], NoisePolicy(), [few], 1)
    (b,) = mixture([batch], NoisePolicy(), [all_of_them], 1)
    assert torch.equal(a.context_ids[few], b.context_ids[few])


def test_masks_differ_between_steps_seeds_and_samples() -> None:
    batch, other = _alone(), padded([PROMPT], [RESPONSE], [78])
    masks = [
        replacement_mask(batch, 0.5, REPLACE),
        replacement_mask(batch, 0.5, (hashing.REPLACE, SEED, STEP + 1)),
        replacement_mask(batch, 0.5, (hashing.REPLACE, SEED + 1, STEP)),
        replacement_mask(other, 0.5, REPLACE),
    ]
    assert len({tuple(mask[0].tolist()) for mask in masks}) == 4


def test_draws_differ_between_steps_seeds_and_samples() -> None:
    batch, other = _alone(), padded([PROMPT], [RESPONSE], [78])
    mixed = [
        mix([b], NoisePolicy(), [b.replaceable_mask], 1, (hashing.DRAW, seed, step))[0][0]
        for b, seed, step in [
            (batch, SEED, STEP),
            (batch, SEED, STEP + 1),
            (batch, SEED + 1, STEP),
            (other, SEED, STEP),
        ]
    ]
    assert len({tuple(m.context_ids[0].tolist()) for m in mixed}) == 4


def test_the_noise_of_a_draw_is_independent_of_the_coin_that_chose_it() -> None:
    batch = padded([[1]] * 200, [[2] * 501] * 200, list(range(200)))
    policy = RecordingPolicy()
    mixture([batch], policy, _masks([batch], 0.1), 1)
    (uniforms,) = policy.uniforms  # the coins of masked tokens are all below 0.1
    assert float(uniforms.mean()) == pytest.approx(0.5, abs=5 / math.sqrt(12 * len(uniforms)))


def test_every_masked_token_has_a_noise_of_its_own() -> None:
    batches = _random_batches(8)
    masks = _masks(batches, 0.4)
    policy = RecordingPolicy()
    mixture(batches, policy, masks, 1)
    assert [len(u) for u in policy.uniforms] == [int(mask.sum()) for mask in masks]


# --- packing ---


class PrefixPolicy(Policy):
    """Draws a function of the noise and of all context tokens of the sample before the drawn token."""

    def draw(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        return [self._draw(*values) for values in zip(batches, masks, uniforms, strict=True)]

    def _draw(self, batch: TokenBatch, mask: Tensor, uniforms: Tensor) -> Tensor:
        drawn = []
        for (row, column), uniform in zip(mask.nonzero().tolist(), uniforms.tolist(), strict=True):
            first = column - int(batch.position_ids[row, column])
            assert batch.sample_ids[row, first:column].eq(batch.sample_ids[row, column]).all()
            drawn.append(hash((tuple(batch.context_ids[row, first:column].tolist()), uniform)) % 1000)
        return torch.tensor(drawn, dtype=torch.int64)


def _some_samples(count: int) -> list[TrainingRow]:
    """Return samples of random lengths up to 22, and one with two turns."""
    generator = torch.Generator().manual_seed(11)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(100, (length,), generator=generator).tolist()

    samples = [sample(ids(12), ids(12), sample_id) for sample_id in range(count)]
    two_turns = TrainingRow.reference(count, np.arange(200, 220), np.array([[3, 8, 9], [12, 16, 17]]))
    return [*samples, two_turns]


def _by_sample(batches: list[TokenBatch], name: str) -> dict[int, list[int]]:
    """Return the values of one tensor by sample id."""
    found: dict[int, list[int]] = {}
    for batch in batches:
        for row, column in (batch.sample_ids >= 0).nonzero().tolist():
            value = getattr(batch, name)[row, column].item()
            found.setdefault(int(batch.sample_ids[row, column]), []).append(value)
    return found


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_packed_batches_have_the_masks_and_draws_of_padded_ones(p: float, passes: int) -> None:
    samples = _some_samples(24)
    rows = pack([len(s) for s in samples], 40)
    packed = [collate([[samples[i] for i in row] for row in rows[k::2]], packed=True) for k in range(2)]
    alone = [collate([[s] for s in samples[k::5]]) for k in range(5)]
    mixed = {}
    for name, batches in (("packed", packed), ("padded", alone)):
        mixed[name] = mixture(batches, PrefixPolicy(), _masks(batches, p), passes)
    assert len(rows) < len(samples) / 2
    for field in ("replaced_mask", "context_ids", "target_ids", "loss_mask", "replaceable_mask", "position_ids"):
        assert _by_sample(mixed["packed"], field) == _by_sample(mixed["padded"], field)
    assert any(any(drawn) for drawn in _by_sample(mixed["packed"], "replaced_mask").values())


def test_what_closes_a_turn_is_never_replaced_in_a_packed_row() -> None:
    samples = _some_samples(6)
    batch = collate([samples], packed=True)
    (mixed,) = mixture([batch], NoisePolicy(), _masks([batch], 1.0), 1)
    context = _by_sample([mixed], "context_ids")
    for s in samples:
        ids = np.array(context[s.sample_id])
        assert (ids[s.replaceable_mask] >= 1000).all()
        assert ids[~s.replaceable_mask].tolist() == s.target_ids[~s.replaceable_mask].tolist()


def test_padding_of_packed_rows_is_never_replaced() -> None:
    batch = collate([_some_samples(6), _some_samples(1)], packed=True)
    (mixed,) = mixture([batch], NoisePolicy(), _masks([batch], 1.0), 1)
    assert not mixed.context_ids[batch.sample_ids < 0].any()


# --- exact ---


class CountingPolicy(PrefixPolicy):
    """Keeps, for every call, the number of tokens drawn in each row."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def draw(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        self.calls.append([count for mask in masks for count in mask.sum(dim=1).tolist()])
        return super().draw(batches, masks, uniforms)


class StickyPolicy(CountingPolicy):
    """Draws mostly the reference, from the last two tokens alone, so that changes die out."""

    def _draw(self, batch: TokenBatch, mask: Tensor, uniforms: Tensor) -> Tensor:
        before = batch.context_ids.roll(1, dims=1)[mask] + batch.context_ids.roll(2, dims=1)[mask]
        return torch.where(uniforms < 0.3, before * 7 % 50, batch.target_ids[mask])


def _token_by_token(batch: TokenBatch, mask: Tensor, policy: Policy) -> Tensor:
    """Run the sequential process: draw one masked token after another, each with its final prefix."""
    context = batch.target_ids.clone()
    for row, column in mask.nonzero().tolist():
        here = torch.zeros_like(mask)
        here[row, column] = True
        uniforms = hashing.uniform(*DRAW, batch.sample_ids[here], batch.position_ids[here])
        context[here] = policy.draw([replace(batch, context_ids=context)], [here], [uniforms])[0]
    return context


def _packed_batches(count: int = 24) -> list[TokenBatch]:
    """Return rows of several samples in two micro-batches, and a micro-batch without rows."""
    samples = _some_samples(count)
    rows = pack([len(s) for s in samples], 40)
    rows_of = [[[samples[i] for i in row] for row in rows[k::2]] for k in range(2)]
    return [collate(some, packed=True) for some in [*rows_of, []]]


LAYOUTS = pytest.mark.parametrize("batches", [_random_batches(5), _packed_batches()], ids=["padded", "packed"])


@LAYOUTS
@sweep(
    ("policy", "p"),
    [
        (SuccessorPolicy(), 0.5),
        (StickyPolicy(), 1.0),
        (PrefixPolicy(), 0.1),
        (PrefixPolicy(), 1.0),
        (StickyPolicy(), 0.5),
    ],
    check=3,
)
def test_exact_is_the_token_by_token_draw(batches: list[TokenBatch], policy: Policy, p: float) -> None:
    masks = _masks(batches, p)
    mixed, _ = mix(batches, policy, masks, "exact", DRAW)
    for before, mask, after in zip(batches, masks, mixed, strict=True):
        assert torch.equal(after.context_ids, _token_by_token(before, mask, policy))
        assert torch.equal(after.replaced_mask, mask)


@LAYOUTS
def test_exact_makes_a_pass_for_each_masked_token_of_a_sample_where_every_draw_changes_all_behind_it(
    batches: list[TokenBatch],
) -> None:
    masks = _masks(batches, 0.5)
    owners = torch.cat([batch.sample_ids[mask] for batch, mask in zip(batches, masks, strict=True)])
    _, made = mix(batches, PrefixPolicy(), masks, "exact", DRAW)
    assert made == int(owners.unique(return_counts=True)[1].max())


def test_exact_stops_where_nothing_changes_any_more() -> None:
    batch = padded([[1, 2]] * 8, [list(range(20, 60))] * 8, list(range(8)))
    policy = StickyPolicy()
    _, made = mix([batch], policy, [batch.replaceable_mask], "exact", DRAW)
    assert 2 < made < 15
    assert made == len(policy.calls)


def test_exact_is_one_pass_where_every_draw_is_the_reference() -> None:
    batches = [padded([[7]], [[8, 9, 10, 11]], [0])]
    assert mix(batches, SuccessorPolicy(), _masks(batches, 1.0), "exact", DRAW)[1] == 1


@pytest.mark.parametrize("passes", [1, 3, "exact"])
def test_without_a_masked_token_there_is_no_pass(passes: int | Literal["exact"]) -> None:
    batches = _random_batches(3)
    policy = CountingPolicy()
    mixed, made = mix(batches, policy, _masks(batches, 0.0), passes, DRAW)
    assert made == len(policy.calls) == 0
    assert all(torch.equal(batch.context_ids, batch.target_ids) for batch in mixed)


def test_a_pass_draws_no_more_than_what_stands_behind_the_first_change_of_each_sample() -> None:
    batches = _packed_batches()
    policy = CountingPolicy()
    mix(batches, policy, _masks(batches, 1.0), "exact", DRAW)
    for before, after in zip(policy.calls, policy.calls[1:], strict=False):
        assert all(later < count or later == count == 0 for count, later in zip(before, after, strict=True))
    # every draw of this policy is a change, so each pass settles one token of every sample that has one left
    owners = torch.cat([batch.sample_ids[batch.replaceable_mask] for batch in batches])
    counts = owners.unique(return_counts=True)[1]
    assert [sum(call) for call in policy.calls] == [int((counts - i).clamp(min=0).sum()) for i in range(counts.max())]


def test_fewer_passes_than_exact_needs_leave_what_every_pass_over_all_tokens_would() -> None:
    batches = _packed_batches()
    masks, policy = _masks(batches, 0.7), StickyPolicy()
    for passes in range(1, 6):
        expected = [batch.context_ids for batch in batches]
        for _ in range(passes):
            read = [replace(batch, context_ids=context) for batch, context in zip(batches, expected, strict=True)]
            uniforms = [
                hashing.uniform(*DRAW, batch.sample_ids[mask], batch.position_ids[mask])
                for batch, mask in zip(batches, masks, strict=True)
            ]
            drawn = policy.draw(read, masks, uniforms)
            expected = [c.masked_scatter(m, d) for c, m, d in zip(expected, masks, drawn, strict=True)]
        for batch, context in zip(mixture(batches, policy, masks, passes), expected, strict=True):
            assert torch.equal(batch.context_ids, context)


class BusyElsewherePolicy(CountingPolicy):
    """Acts as if another rank had tokens to draw in the first three passes."""

    def max_over_ranks(self, value: int) -> int:
        return max(value, len(self.calls) < 3)


def test_a_rank_without_masked_tokens_makes_the_passes_of_the_others() -> None:
    policy = BusyElsewherePolicy()
    batches = [collate([])]
    mixed, made = mix(batches, policy, _masks(batches, 1.0), "exact", DRAW)
    assert made == len(policy.calls) == 3
    assert torch.equal(mixed[0].context_ids, batches[0].context_ids)


# --- position ---


@pytest.mark.parametrize(("position", "p"), [("even", 0.3), ("early", 0.3), ("early", 1.0), ("late", 1.0)])
def test_the_position_decides_where_in_an_answer_tokens_are_replaced(p: float, position: Position) -> None:
    answer, rows = 8, 4000
    batch = padded([[1, 2]] * rows, [[3] * answer + [4]] * rows, list(range(rows)))
    shares = replacement_mask(batch, p, REPLACE, position)[:, 2:].double().mean(dim=0).tolist()
    early = [p * (1 - i / answer) for i in range(answer)]
    expected = {"even": [p] * answer, "early": early, "late": early[::-1]}[position]
    assert shares[-1] == 0
    assert shares[:-1] == pytest.approx(expected, abs=5 * math.sqrt(0.25 / rows))


@pytest.mark.parametrize("position", ["early", "late"])
def test_each_answer_of_a_conversation_has_positions_of_its_own(position: Position) -> None:
    rows = 4000
    turns = np.array([[1, 3, 4], [6, 10, 10], [11, 12, 13]])  # answers of 2, 4 and 1 tokens
    batch = collate([[TrainingRow.reference(i, np.arange(13), turns)] for i in range(rows)])
    shares = replacement_mask(batch, 1.0, REPLACE, position).double().mean(dim=0).tolist()
    two, four = ([0.5, 1], [0.25, 0.5, 0.75, 1]) if position == "late" else ([1, 0.5], [1, 0.75, 0.5, 0.25])
    assert shares == pytest.approx([0, *two, 0, 0, 0, *four, 0, 1, 0], abs=5 * math.sqrt(0.25 / rows))


@pytest.mark.parametrize("position", ["even", "early", "late"])
def test_a_packed_sample_has_the_mask_that_it_has_alone(position: Position) -> None:
    samples = _some_samples(24)
    packed = _packed_batches()
    masks = [replacement_mask(batch, 0.6, REPLACE, position) for batch in packed]
    alone = collate([[s] for s in samples])
    mask = replacement_mask(alone, 0.6, REPLACE, position)
    together = [replace(batch, replaced_mask=mask) for batch, mask in zip(packed, masks, strict=True)]
    assert _by_sample(together, "replaced_mask") == _by_sample([replace(alone, replaced_mask=mask)], "replaced_mask")


@pytest.mark.parametrize("position", ["early", "late"])
def test_a_position_only_takes_tokens_from_the_even_mask(position: Position) -> None:
    for batch in _random_batches(9):
        uneven, even = replacement_mask(batch, 0.6, REPLACE, position), replacement_mask(batch, 0.6, REPLACE)
        assert not (uneven & ~even).any()


# --- stop ---


def test_behind_a_marked_token_the_context_is_the_reference_to_its_samples_end() -> None:
    batches = _packed_batches()
    for before in mixture(batches, PrefixPolicy(), _masks(batches, 1.0), 1):
        generator = torch.Generator().manual_seed(0)
        marked = torch.rand(before.context_ids.shape, generator=generator) < 0.05
        after = restore_reference_from(before, marked)
        for owner in before.sample_ids[before.sample_ids >= 0].unique():
            row, columns = torch.where(before.sample_ids == owner)
            found = marked[row, columns].nonzero().flatten().tolist()
            end = found[0] if found else len(columns)
            context, target = before.context_ids[row, columns], before.target_ids[row, columns]
            assert after.context_ids[row, columns].tolist() == context[:end].tolist() + target[end:].tolist()
            drawn = before.replaced_mask[row, columns].tolist()
            assert after.replaced_mask[row, columns].tolist() == drawn[:end] + [False] * (len(columns) - end)


def test_a_stopped_batch_keeps_all_but_context_and_drawn() -> None:
    (before,) = mixture([_in_company()], NoisePolicy(), [_in_company().replaceable_mask], 1)
    after = restore_reference_from(before, before.loss_mask)
    for name in ("sample_ids", "position_ids", "target_ids", "loss_mask", "replaceable_mask"):
        assert torch.equal(getattr(after, name), getattr(before, name))


# --- the largest share of differing tokens ---


@pytest.mark.parametrize(
    ("share", "passes"), [(0.1, 1), (0.1, 3), (0.1, "exact"), (0.0, "exact"), (0.2, 3), (1.0, "exact")]
)
def test_the_draws_stop_at_the_first_differing_token_beyond_the_share(
    share: float, passes: int | Literal["exact"]
) -> None:
    batches = _packed_batches()
    masks, policy = _masks(batches, 0.8), StickyPolicy()
    free, _ = mix(batches, policy, masks, passes, DRAW)
    capped, _ = mix(batches, policy, masks, passes, DRAW, share)
    context, drawn = _by_sample(capped, "context_ids"), _by_sample(capped, "replaced_mask")
    free_context, free_drawn = _by_sample(free, "context_ids"), _by_sample(free, "replaced_mask")
    target, responses = _by_sample(batches, "target_ids"), _by_sample(batches, "loss_mask")
    stopped = 0
    for owner, ids in free_context.items():
        differing = [i for i, (a, b) in enumerate(zip(ids, target[owner], strict=True)) if a != b]
        allowed = math.floor(share * sum(responses[owner]))
        end = differing[allowed] if len(differing) > allowed else len(ids)
        stopped += end < len(ids)
        assert context[owner] == ids[:end] + target[owner][end:]
        assert drawn[owner] == free_drawn[owner][:end] + [False] * (len(ids) - end)
    assert (stopped > 0) == (share < 1)


def test_a_share_that_is_a_whole_number_of_tokens_allows_that_many() -> None:
    batch = padded([[1]], [[5] * 100], [0])  # 0.29 * 100 is a little less than 29
    ((mixed,), _) = mix([batch], NoisePolicy(), [batch.replaceable_mask], 1, DRAW, 0.29)
    assert int((mixed.context_ids != mixed.target_ids).sum()) == 29


def test_what_stands_behind_the_stop_is_not_drawn_again() -> None:
    batch = padded([[1]] * 3, [[5] * 40] * 3, [0, 1, 2])
    policy = CountingPolicy()
    _, made = mix([batch], policy, [batch.replaceable_mask], "exact", DRAW, 0.1)
    assert made == 5  # four tokens that may differ, and one too many


def test_clean_rows_are_a_share_of_the_samples_and_others_in_every_step() -> None:
    batch = padded([[1]] * 400, [list(range(20, 30))] * 400, list(range(400)))
    settings = SelfgenConfig(replace_probability=1.0, clean_share=0.3)
    masks = [mask_of(settings, batch, 1.0, (hashing.REPLACE, SEED, step)) for step in (1, 1, 2)]
    clean = [~mask.any(dim=1) for mask in masks]
    assert 0.2 < clean[0].double().mean() < 0.4
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(clean[0], clean[2])
    assert torch.equal(masks[0][~clean[0]], batch.replaceable_mask[~clean[0]]), "the others are masked as without it"
    assert not clean_rows(batch, 0.0, REPLACE).any()


def test_a_span_is_one_run_of_tokens_that_starts_anywhere() -> None:
    batch = padded([[1, 2]] * 2000, [list(range(20, 31))] * 2000, list(range(2000)))  # 10 replaceable tokens a row
    mask = replacement_mask(batch, 0.5, REPLACE, "span", 3)
    with_span = mask.any(dim=1)
    assert 0.45 < with_span.double().mean() < 0.55
    runs = (mask.long().diff(dim=1, prepend=torch.zeros(len(mask), 1, dtype=torch.int64)) == 1).sum(dim=1)
    assert set(runs[with_span].tolist()) == {1}
    starts = mask[with_span].long().argmax(dim=1) - 2
    counts = torch.bincount(starts, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 0.6 * counts.double().mean(), "every token is as likely a start"
    lengths_by_start = {(int(s), int(row.sum())) for s, row in zip(starts, mask[with_span], strict=True)}
    assert lengths_by_start == {(start, min(3, 10 - start)) for start in range(10)}


def test_a_span_does_not_reach_into_the_next_answer() -> None:
    turns = np.array([[1, 4, 5], [6, 9, 10]])  # two answers of three replaceable tokens each
    rows = [TrainingRow.reference(i, np.arange(10), turns) for i in range(300)]
    mask = replacement_mask(collate([[row] for row in rows]), 1.0, REPLACE, "span", 5)
    both = mask[:, 1:4].any(dim=1) & mask[:, 6:9].any(dim=1)
    assert not both.any()
    assert mask[:, 1:4].any(dim=1).any()
    assert mask[:, 6:9].any(dim=1).any()


def test_packed_samples_have_spans_of_their_own() -> None:
    rows = [sample([1, 2], list(range(20, 28)), i) for i in range(6)]
    packed = collate([rows[:3], rows[3:]], packed=True)
    alone = collate([[row] for row in rows])
    expected = replacement_mask(alone, 1.0, REPLACE, "span", 3)
    found = replacement_mask(packed, 1.0, REPLACE, "span", 3)
    for i in range(6):
        assert torch.equal(found[packed.sample_ids == i], expected[i][alone.sample_ids[i] == i])


@pytest.mark.parametrize("most", [0, 1, 3])
def test_a_number_of_differing_tokens_is_a_limit_too(most: int) -> None:
    batch = padded([[1, 2]] * 8, [list(range(20, 40))] * 8, list(range(8)))
    masks = [replacement_mask(batch, 1.0, REPLACE)]
    ((read,), _) = mix([batch], NoisePolicy(), masks, 1, DRAW, 1.0, most)
    assert (read.context_ids != read.target_ids).sum(dim=1).tolist() == [most] * 8
    ((both,), _) = mix([batch], NoisePolicy(), masks, 1, DRAW, 0.1, most)
    assert (both.context_ids != both.target_ids).sum(dim=1).tolist() == [min(most, 2)] * 8
