from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from selfgen_ds.data.batches import StepBatches, TokenBatch, collate
from selfgen_ds.data.encoding import Format
from selfgen_ds.data.packing import load_packs
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.row_checks import TextPair
from selfgen_ds.data.rows import Opened
from selfgen_ds.data.samples import Samples, load_samples, with_consecutive_ids
from selfgen_ds.data.tokenizer import byte_tokenizer
from tests.batches import lengths, padded, sample, samples_in

# --- collate ---


@pytest.fixture
def batch() -> TokenBatch:
    """Return rows of 5, 3 and 2 tokens; token 0 is both content and padding."""
    return padded([[1, 2], [0], [9]], [[3, 4, 0], [0, 0], [7]], [10, 11, 12])


def test_a_row_is_its_prompt_and_response_padded_on_the_right(batch: TokenBatch) -> None:
    assert batch.target_ids.tolist() == [[1, 2, 3, 4, 0], [0, 0, 0, 0, 0], [9, 7, 0, 0, 0]]


def test_the_context_of_a_collated_batch_is_the_reference(batch: TokenBatch) -> None:
    assert torch.equal(batch.context_ids, batch.target_ids)


def test_every_token_has_its_samples_id_and_padding_has_none(batch: TokenBatch) -> None:
    assert lengths(batch) == [5, 3, 2]
    assert batch.sample_ids.tolist() == [[10] * 5, [11, 11, 11, -1, -1], [12, 12, -1, -1, -1]]


def test_every_token_has_its_position_in_its_sample(batch: TokenBatch) -> None:
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0], [0, 1, 0, 0, 0]]


def test_the_loss_is_on_the_response_and_never_on_prompt_or_padding(batch: TokenBatch) -> None:
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]


def test_every_response_token_but_the_last_is_replaceable(batch: TokenBatch) -> None:
    assert batch.replaceable_mask.int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_nothing_of_a_collated_batch_is_drawn(batch: TokenBatch) -> None:
    assert not batch.replaced_mask.any()


def test_every_tensor_has_its_documented_type(batch: TokenBatch) -> None:
    for ids in (batch.sample_ids, batch.position_ids, batch.context_ids, batch.target_ids):
        assert (ids.dtype, ids.shape) == (torch.int64, (3, 5))
    for mask in (batch.loss_mask, batch.replaceable_mask, batch.replaced_mask):
        assert (mask.dtype, mask.shape) == (torch.bool, (3, 5))


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_without_rows_can_be_read_but_has_no_targets(packed: bool) -> None:
    empty = collate([], packed=packed)
    assert empty.context_ids.shape == (1, 2)
    assert not (empty.loss_mask | empty.replaceable_mask | empty.replaced_mask).any()
    assert empty.sample_ids.tolist() == [[-1, -1]]


TURNS = TrainingRow.reference(20, np.arange(30, 39), np.array([[2, 3, 4], [6, 7, 8]]))
# two turns, each of one replaceable token and the token that closes the turn


def test_of_several_turns_each_has_loss_and_its_own_closing_token() -> None:
    batch = collate([[TURNS]])
    assert batch.loss_mask[0].int().tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert batch.replaceable_mask[0].int().tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0]


def test_packed_samples_follow_each_other_and_each_counts_from_zero() -> None:
    batch = collate(
        [[sample([1, 2], [3, 4, 0], 10), TURNS, sample([9], [7], 12)], [sample([5], [6, 8], 13)]], packed=True
    )
    assert batch.packed
    assert batch.target_ids.tolist() == [[1, 2, 3, 4, 0, *range(30, 39), 9, 7], [5, 6, 8, *[0] * 13]]
    assert batch.sample_ids.tolist() == [[10] * 5 + [20] * 9 + [12] * 2, [13] * 3 + [-1] * 13]
    assert batch.position_ids.tolist() == [[*range(5), *range(9), 0, 1], [0, 1, 2, *[0] * 13]]
    assert batch.loss_mask[0].int().tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1]
    assert batch.replaceable_mask[0].int().tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]


def test_positions_are_told_to_the_model_only_where_samples_are_packed() -> None:
    packed, alone = collate([[TURNS]], packed=True), collate([[TURNS]])
    assert packed.packed_position_ids is packed.position_ids
    assert alone.packed_position_ids is None


# --- StepBatches ---


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with samples_in(tmp_path_factory.mktemp("cache")):
        yield


@cache
def _source(sizes: tuple[int, ...]) -> Samples:
    rows = [TextPair(prompt="p", completion="c" * (size - 2)) for size in sizes]
    opened = Opened(name="rows.jsonl", fingerprint=[repr(sizes)], rows=rows)
    return load_samples(opened, byte_tokenizer(), Format(max_length=100))


def _samples(sizes: list[int]) -> Samples:
    """Return a source of samples with the given numbers of tokens, each 3 or more."""
    return _source(tuple(sizes))


def _step_batches(
    count: int = 24, *, sources: list[Samples] | None = None, packing: bool = False, **others: Any
) -> StepBatches:
    samples = sources or [_samples([3 + number % 5 for number in range(count)])]
    defaults: dict[str, Any] = {
        "seed": 0,
        "micro_batch_size": 2,
        "rank": 0,
        "world_size": 1,
        "epochs": None,
    }
    packs = [load_packs(source, 100) for source in samples] if packing else None
    shape = defaults | others
    accumulation = shape.pop("accumulation", 2)
    rows = shape["micro_batch_size"] * accumulation * shape["world_size"]
    return StepBatches(samples, packs=packs, **({"step_size": rows} | shape))


def _batch_ids(batch: TokenBatch) -> list[int]:
    """Return the ids of the samples of a batch in order, each once."""
    firsts = (batch.sample_ids >= 0) & (batch.position_ids == 0)
    return batch.sample_ids[firsts].tolist()


def _ids(step_batches: StepBatches, steps: range) -> list[int]:
    """Return sample ids in the order in which one rank sees them."""
    return [i for step in steps for batch in step_batches.at(step) for i in _batch_ids(batch)]


LONG = [3 + (7 * number) % 50 for number in range(120)]
_several = cache(lambda: with_consecutive_ids([_samples(LONG[:70]), _samples(LONG[70:])]))
ALL = ["plain", "packed", "grouped", "weighted", "several", "several packed"]
KINDS = pytest.mark.parametrize("kind", ALL)


def _of_kind(kind: str, **others: Any) -> StepBatches:
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "packed": {"packing": True},
        "grouped": {"group_by_length": True},
        "weighted": {"sources": _several(), "weights": [1.0, 3.0]},
        "several": {"sources": _several(), "group_by_length": True},
        "several packed": {"sources": _several(), "packing": True},
    }
    return _step_batches(**({"sources": [_samples(LONG)]} | settings[kind] | others))


def test_a_step_has_its_micro_batches() -> None:
    batches = _step_batches(micro_batch_size=3, accumulation=4).at(0)
    assert [len(batch.context_ids) for batch in batches] == [3] * 4


def test_a_rows_tokens_come_with_its_sample_id() -> None:
    source = _samples([3 + number % 5 for number in range(24)])
    for batch in _step_batches(sources=[source]).at(3):
        for row, size in enumerate(lengths(batch)):
            assert batch.context_ids[row, :size].tolist() == source[int(batch.sample_ids[row, 0])].target_ids.tolist()


@KINDS
def test_a_run_of_epochs_visits_every_sample_once_an_epoch(kind: str) -> None:
    runs = [_of_kind(kind, rank=rank, world_size=2, epochs=2) for rank in range(2)]
    seen = Counter(i for step_batches in runs for i in _ids(step_batches, range(step_batches.steps())))
    if kind == "weighted":
        assert sum(seen.values()) == 240
        assert sum(seen[i] for i in range(70)) == 60
        assert {seen[i] for i in range(70, 120)} <= {3, 4}
    else:
        assert seen == dict.fromkeys(range(120), 2)


def test_a_step_that_an_epoch_does_not_fill_takes_rows_of_the_next_epoch() -> None:
    seen = Counter(_ids(_step_batches(7), range(7)))  # 7 steps of 4 rows are 4 epochs of 7
    assert set(seen.values()) == {4}


@pytest.mark.parametrize(
    ("kind", "ranks", "micro"),
    [("plain", *shape) for shape in [(1, 4), (2, 2), (8, 1), (3, 1), (2, 3), (11, 1)]] + [(kind, 3, 2) for kind in ALL],
)
def test_a_step_has_the_same_rows_on_any_number_of_ranks(kind: str, ranks: int, micro: int) -> None:
    whole = _of_kind(kind, micro_batch_size=8, accumulation=1)
    parts = [_of_kind(kind, step_size=8, micro_batch_size=micro, rank=rank, world_size=ranks) for rank in range(ranks)]
    assert {len(step_batches.at(0)) for step_batches in parts} == {-(-8 // (micro * ranks))}
    for step in (0, 14, 15):  # the first two in the first epoch, the last in the second
        rows = [i for step_batches in parts for i in _ids(step_batches, range(step, step + 1))]
        assert sorted(rows) == sorted(_ids(whole, range(step, step + 1)))


@pytest.mark.parametrize(("kind", "ranks"), [*(("plain", ranks) for ranks in (2, 4, 5)), *((kind, 3) for kind in ALL)])
def test_micro_batches_are_the_same_on_any_number_of_ranks(kind: str, ranks: int) -> None:
    parts = [
        _of_kind(kind, step_size=8, micro_batch_size=2, rank=rank, world_size=ranks).at(3) for rank in range(ranks)
    ]
    dealt = [_batch_ids(batch) for in_turn in zip(*parts, strict=True) for batch in in_turn]
    alone = _of_kind(kind, step_size=8, micro_batch_size=2).at(3)
    assert dealt[:4] == [_batch_ids(batch) for batch in alone]
    assert not any(dealt[4:])


@KINDS
def test_any_step_alone_is_what_it_is_in_sequence(kind: str) -> None:
    uninterrupted = _of_kind(kind)
    expected = {step: _ids(uninterrupted, range(step, step + 1)) for step in (0, 3, 49, 50, 52)}
    for step in (52, 3, 50, 0):
        assert _ids(_of_kind(kind), range(step, step + 1)) == expected[step]
        assert _ids(uninterrupted, range(step, step + 1)) == expected[step]


@KINDS
def test_the_order_changes_with_the_epoch_and_the_seed(kind: str) -> None:
    step_batches = _of_kind(kind, epochs=2)
    half = step_batches.steps() // 2
    assert _ids(step_batches, range(3)) != _ids(step_batches, range(half, half + 3))
    assert _ids(_of_kind(kind, seed=0), range(3)) != _ids(_of_kind(kind, seed=1), range(3))


def test_a_run_of_epochs_ends_with_a_short_step() -> None:
    step_batches = _step_batches(5, epochs=2)  # 10 rows: 4, 4, 2
    assert step_batches.steps() == 3
    assert [len(_ids(step_batches, range(step, step + 1))) for step in range(4)] == [4, 4, 2, 0]


def test_a_grouped_run_ends_with_a_short_step_too() -> None:
    step_batches = _step_batches(5, epochs=2, group_by_length=True)
    assert [len(_ids(step_batches, range(step, step + 1))) for step in (0, 1, 2, 3, 60)] == [4, 4, 2, 0, 0]


@pytest.mark.parametrize("packing", [False, True])
def test_a_rank_without_rows_left_still_has_its_micro_batches(packing: bool) -> None:
    source = [_samples([100] * 4)]  # each fills a packed row
    step_batches = _step_batches(sources=source, packing=packing, rank=1, world_size=2, accumulation=3, epochs=1)
    batches = step_batches.at(0)
    assert [len(_batch_ids(batch)) for batch in batches] == [2, 0, 0]
    assert {batch.packed for batch in batches} == {packing}


def test_half_an_epoch_visits_half_of_the_rows_once() -> None:
    step_batches = _step_batches(24, epochs=0.5)
    seen = _ids(step_batches, range(step_batches.steps()))
    assert len(seen) == len(set(seen)) == 12


@pytest.mark.parametrize(
    ("epochs", "ranks", "steps"), [(1.0, 1, 6), (1.0, 2, 3), (2.5, 1, 15), (1.0, 5, 2), (0.01, 1, 0)]
)
def test_steps_are_as_many_as_the_epochs_take(epochs: float, ranks: int, steps: int) -> None:
    assert _step_batches(24, world_size=ranks, epochs=epochs).steps() == steps


def test_epochs_done_are_rows_seen_over_rows() -> None:
    step_batches = _step_batches(24)  # 4 rows a step
    assert [step_batches.epoch(step) for step in (0, 3, 6, 60)] == [0.0, 0.5, 1.0, 10.0]


def test_epochs_done_never_pass_the_epochs_of_the_run() -> None:
    step_batches = _step_batches(5, epochs=2)
    assert step_batches.epoch(step_batches.steps()) == 2.0


def test_an_epoch_of_packed_rows_is_as_many_rows_as_there_are_packs() -> None:
    step_batches = _of_kind("packed", epochs=1)
    assert len(step_batches) == len(load_packs(_samples(LONG), 100)) < 60
    assert step_batches.steps() == -(-len(step_batches) // 4)


def test_packed_rows_are_nearly_full() -> None:
    batches = [batch for step in range(5) for batch in _of_kind("packed").at(step)]
    assert all(batch.packed for batch in batches)
    assert sum(sum(lengths(batch)) for batch in batches) > 0.9 * 100 * sum(len(batch.context_ids) for batch in batches)


def test_every_sample_of_several_sources_has_an_id_of_its_own() -> None:
    # an id counts the rows that were read, including the refused rows of the first source
    rows = [TextPair(prompt="p" * (200 if number % 2 else 1), completion="a") for number in range(10)]
    first = load_samples(Opened(name="a", fingerprint=["odd"], rows=rows), byte_tokenizer(), Format(max_length=100))
    assert first.refused == 5
    step_batches = _step_batches(sources=with_consecutive_ids([first, _samples([4, 5, 6])]), epochs=1)
    assert sorted(_ids(step_batches, range(step_batches.steps()))) == [0, 2, 4, 6, 8, 10, 11, 12]
    for batch in step_batches.at(0):
        for row, size in enumerate(lengths(batch)):
            assert size == {10: 4, 11: 5, 12: 6}.get(int(batch.sample_ids[row, 0]), 3)


def _padding(step_batches: StepBatches, steps: int) -> float:
    """Return the share of padding in the tokens of some steps."""
    batches = [batch for step in range(steps) for batch in step_batches.at(step)]
    return 1 - sum(sum(lengths(batch)) for batch in batches) / sum(batch.context_ids.numel() for batch in batches)


def test_grouping_saves_most_of_the_padding() -> None:
    assert _padding(_of_kind("grouped"), 50) < 0.2 * _padding(_of_kind("plain"), 50)


def test_grouped_steps_are_not_in_the_order_of_their_lengths() -> None:
    step_batches = _of_kind("grouped")
    longest = [max(max(lengths(batch)) for batch in step_batches.at(step)) for step in range(50)]
    assert abs(np.corrcoef(np.arange(50), longest)[0, 1]) < 0.4


def test_every_group_of_grouped_steps_has_an_order_of_its_own() -> None:
    lengths_once = list(range(3, 53))  # as many rows as a group has steps
    step_batches = _step_batches(
        sources=[_samples(lengths_once)], group_by_length=True, micro_batch_size=1, accumulation=1
    )
    groups = [[lengths(step_batches.at(step)[0])[0] for step in range(first, first + 50)] for first in (0, 50, 100)]
    assert all(sorted(group) == lengths_once for group in groups)
    assert len({tuple(group) for group in groups}) == 3


# --- over other rows ---


class ListRows:
    """Rows of given lengths, with consecutive sample ids."""

    def __init__(self, row_lengths: list[int], first_id: int = 0, context: int | None = None) -> None:
        self._lengths, self._first_id, self._context = np.array(row_lengths), first_id, context

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int, /) -> TrainingRow:
        row = sample([0] * (int(self._lengths[index]) - 2), [1, 1], self._first_id + index)
        return row if self._context is None else replace(row, context_ids=np.full(len(row), self._context))

    def lengths(self, indices: np.ndarray, /) -> np.ndarray:
        return self._lengths[indices]


def _drawn(step_batches: StepBatches) -> list[ListRows]:
    """Return the rows of a method that keeps rows: one row per sample, with another context."""
    return [
        ListRows([int(n) for n in source.lengths(np.arange(len(source)))], getattr(source, "first_id", 0), context=7)
        for source in step_batches.samples
    ]


GROUPED = ("grouped", "several")  # only their order depends on the steps: from step 50 there is another group


@pytest.mark.parametrize(
    ("kind", "steps"),
    [(kind, range(118, 122)) for kind in ALL]
    + [(kind, steps) for kind in GROUPED for steps in (range(3, 4), range(48, 52))],
)
def test_as_many_rows_come_in_the_very_order_of_the_data_set(kind: str, steps: range) -> None:
    step_batches = _of_kind(kind, rank=1, world_size=2)  # 120 steps are 8 epochs
    others = step_batches.with_rows(_drawn(step_batches), steps)
    for step in steps:
        for ours, theirs in zip(others.at(step), step_batches.at(step), strict=True):
            assert torch.equal(ours.sample_ids, theirs.sample_ids)
            assert torch.equal(ours.position_ids, theirs.position_ids)
            assert (ours.context_ids[ours.sample_ids >= 0] == 7).all()


@pytest.mark.parametrize("grouped", [False, True])
def test_as_many_rows_of_other_lengths_come_once_an_epoch(grouped: bool) -> None:
    step_batches = _step_batches(sources=[_samples(LONG)], group_by_length=grouped)
    others = step_batches.with_rows([ListRows(LONG[60:] + LONG[:60])], range(30, 60))
    assert sorted(_ids(others, range(30, 60))) == list(range(120))


ROUNDS = [range(0, 30), range(30, 60), range(61, 90), range(61, 121)]  # steps of 4 rows each; an epoch has 120 rows


COUNTS = [3, 50, 119, 121, 240, 500]


@pytest.mark.parametrize(
    ("count", "grouped", "steps"),
    [(count, False, ROUNDS[3]) for count in COUNTS]
    + [(count, True, ROUNDS[number % 4]) for number, count in enumerate(COUNTS)]
    + [(50, False, steps) for steps in ROUNDS[:3]],
)
def test_of_fewer_or_more_rows_none_comes_twice_more_than_another_within_a_round(
    count: int, grouped: bool, steps: range
) -> None:
    step_batches = _step_batches(sources=[_samples(LONG)], group_by_length=grouped)
    others = step_batches.with_rows([ListRows([3 + (5 * i) % 40 for i in range(count)])], steps)
    seen = Counter(_ids(others, steps))
    times = [seen[row] for row in range(count)]
    assert sum(times) == 4 * len(steps)
    assert max(times) - min(times) <= 1


def test_of_more_rows_another_round_has_others() -> None:
    step_batches = _step_batches(sources=[_samples(LONG)])
    rows = [ListRows([5] * 480)]
    first, second = (set(_ids(step_batches.with_rows(rows, steps), steps)) for steps in ROUNDS[:2])
    assert len(first) == len(second) == 120
    assert first != second


@pytest.mark.parametrize("grouped", [False, True])
def test_other_rows_of_several_sources_keep_their_shares(grouped: bool) -> None:
    step_batches = _of_kind("weighted", group_by_length=grouped)
    rows = [ListRows([4] * 35), ListRows([5] * 45, first_id=1000)]
    for steps in ROUNDS[:2]:
        others = step_batches.with_rows(rows, steps)
        seen = _ids(others, steps)
        assert sum(i >= 1000 for i in seen) == pytest.approx(0.75 * 120, abs=12)
    unweighted = _of_kind("several", group_by_length=grouped)
    once = Counter(_ids(unweighted.with_rows(rows, range(0, 20)), range(0, 20)))
    assert once == dict.fromkeys((*range(35), *range(1000, 1045)), 1)


@pytest.mark.parametrize(("count", "grouped"), [(50, False), (120, True), (500, True)])
def test_a_run_is_as_long_whatever_the_rows(count: int, grouped: bool) -> None:
    step_batches = _step_batches(
        sources=[_samples(LONG)], group_by_length=grouped, epochs=1.99, world_size=2
    )  # 239 rows
    others = step_batches.with_rows([ListRows([5] * count)], range(16, 30))
    assert (others.steps(), len(others), others.step_size) == (
        step_batches.steps(),
        len(step_batches),
        step_batches.step_size,
    )
    assert [others.epoch(step) for step in range(40)] == [step_batches.epoch(step) for step in range(40)]
    ranks = [
        _step_batches(
            sources=[_samples(LONG)], group_by_length=grouped, epochs=1.99, world_size=2, rank=rank
        ).with_rows([ListRows([5] * count)], range(16, 30))
        for rank in range(2)
    ]
    assert [sum(len(_ids(one, range(step, step + 1))) for one in ranks) for step in range(28, 31)] == [8, 7, 0]


@pytest.mark.parametrize("grouped", [False, True])
def test_any_step_over_other_rows_alone_is_what_it_is_in_sequence(grouped: bool) -> None:
    step_batches = _step_batches(sources=[_samples(LONG)], group_by_length=grouped)
    rows, steps = [ListRows([3 + (5 * i) % 40 for i in range(333)])], range(61, 191)
    some = (61, 62, 110, 111, 160, 161, 190)  # at both ends of each group of 50
    expected = [_ids(step_batches.with_rows(rows, steps), range(step, step + 1)) for step in some]
    uninterrupted = step_batches.with_rows(rows, steps)
    assert [_ids(uninterrupted, range(step, step + 1)) for step in some] == expected


def test_the_data_sets_own_batches_stay_as_they_were() -> None:
    step_batches = _of_kind("grouped")
    before = _ids(step_batches, range(48, 52))
    step_batches.with_rows([ListRows([5] * 9)], range(60)).at(3)
    assert _ids(step_batches, range(48, 52)) == before
