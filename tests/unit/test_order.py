import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfgen_ds.data.order import Stream, permute
from selfgen_ds.errors import InputError
from tests.tiers import sweep

SIZES = [1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 1024, 1025, 4096, 4097, 65_536, 65_537]


def _permutation(size: int, *keys: int) -> np.ndarray:
    return permute(np.arange(size), size, *keys)


def _rows(stream: Stream, first: int, behind: int) -> list[tuple[int, int]]:
    return [(source, row) for source, row in stream.at(np.arange(first, behind)).tolist()]


# --- permute ---


@pytest.mark.parametrize("size", SIZES)
def test_every_number_comes_once(size: int) -> None:
    for key in range(3):
        assert np.array_equal(np.sort(_permutation(size, key)), np.arange(size))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.integers(1, 5000), keys=st.lists(st.integers(0, 2**31), max_size=3))
def test_every_number_comes_once_for_any_size_and_keys(size: int, keys: list[int]) -> None:
    assert np.array_equal(np.sort(_permutation(size, *keys)), np.arange(size))


def test_a_position_alone_is_what_it_is_among_all() -> None:
    whole = _permutation(1000, 7, 3)
    picked = np.array([999, 0, 31, 31, 500])
    assert permute(picked, 1000, 7, 3).tolist() == whole[picked].tolist()
    assert permute(np.array([], dtype=np.int64), 1000, 7, 3).tolist() == []


def test_a_permutation_is_the_same_in_every_run() -> None:
    assert _permutation(16, 7, 3).tolist() == [11, 8, 6, 3, 12, 4, 9, 14, 13, 1, 10, 0, 15, 7, 2, 5]
    assert permute(np.arange(5), 10**6, 7, 3).tolist() == [467914, 481090, 211140, 682576, 839746]


def test_other_keys_give_another_permutation() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2**20), (2**30, 0), (0, 0, 1)]
    assert len({tuple(_permutation(100, *key).tolist()) for key in keys}) == len(keys)


def test_a_billion_rows_are_permuted_without_a_list_of_them() -> None:
    positions = np.arange(0, 10**9, 10**6)
    tracemalloc.start()
    found = permute(positions, 10**9, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 0
    assert found.max() < 10**9


def _chi_square_is_usual(counts: np.ndarray, expected: float) -> bool:
    """Return whether chi-square is within 5 standard deviations of its mean."""
    freedom = counts.size - 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [2, 3, 16, 17])
def test_over_many_keys_every_number_comes_equally_often_to_every_place(size: int) -> None:
    keys = 1000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), _permutation(size, key)] += 1
    # rows and columns have fixed sums, which leaves (size - 1)^2 degrees of freedom
    freedom = (size - 1) ** 2
    chi_square = float(((counts - keys / size) ** 2 / (keys / size)).sum()) * (size - 1) / size
    assert abs(chi_square - freedom * (size - 1) / size) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("parts", [pytest.param(6, marks=pytest.mark.test), pytest.param(30, marks=pytest.mark.slow)])
def test_over_many_keys_a_large_permutation_takes_a_row_to_every_part_equally_often(parts: int) -> None:
    width = 1500 // parts
    places = np.array([permute(np.array([0, 1, 1024, 1499]), 1500, key) for key in range(50 * parts)])
    for column in places.T:
        assert _chi_square_is_usual(np.bincount(column // width, minlength=parts), 50)
    assert _chi_square_is_usual(np.bincount((places[:, 1] - places[:, 0]) % 1500 // width, minlength=parts), 50)


def test_over_many_keys_every_order_of_four_comes_equally_often() -> None:
    keys = 2400
    orders = Counter(tuple(_permutation(4, key).tolist()) for key in range(keys))
    assert len(orders) == 24
    assert _chi_square_is_usual(np.array(list(orders.values())), keys / 24)


@sweep("size", [1000, 2000])
def test_as_many_numbers_stay_in_place_as_by_chance(size: int) -> None:
    fixed = [int((_permutation(size, key) == np.arange(size)).sum()) for key in range(100)]
    assert np.mean(fixed) == pytest.approx(1.0, abs=5 / math.sqrt(100))  # Poisson with mean 1
    assert np.var(fixed) == pytest.approx(1.0, abs=5 * math.sqrt(3 / 100))


@pytest.mark.parametrize("lag", [1, 2, 16, 256])
def test_neighboring_positions_are_uncorrelated(lag: int) -> None:
    values = _permutation(65_537, 5).astype(float)
    correlation = np.corrcoef(values[:-lag], values[lag:])[0, 1]
    assert abs(correlation) * math.sqrt(len(values)) < 5


def test_the_distance_of_neighbors_is_that_of_chance() -> None:
    values = _permutation(65_537, 6)
    steps = np.diff(values) % 65_537
    counts = np.bincount(steps * 64 // 65_537, minlength=64)
    assert _chi_square_is_usual(counts, len(steps) / 64)


def test_permutations_of_neighboring_keys_are_uncorrelated() -> None:
    first, second = (_permutation(65_537, 0, epoch).astype(float) for epoch in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) * math.sqrt(65_537) < 5


# --- Stream ---


@pytest.mark.parametrize("sizes", [[1], [7], [3, 4], [1, 1, 1], [100, 1, 30]])
def test_without_weights_every_row_comes_once_an_epoch(sizes: list[int]) -> None:
    stream = Stream(sizes, None, seed=3)
    every_row = sorted((source, row) for source, size in enumerate(sizes) for row in range(size))
    assert stream.size == len(every_row)
    for epoch in range(4):
        assert sorted(_rows(stream, epoch * stream.size, (epoch + 1) * stream.size)) == every_row


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    stream = Stream([50, 50], None, seed=3)
    orders = [
        _rows(stream, 0, 100),
        _rows(stream, 100, 200),
        _rows(Stream([50, 50], None, seed=4), 0, 100),
        sorted(_rows(stream, 0, 100)),
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_sources_are_mixed_throughout_an_epoch() -> None:
    stream = Stream([500, 500], None, seed=0)
    for part in range(10):
        here = [source for source, _ in _rows(stream, 100 * part, 100 * part + 100)]
        assert 25 < sum(here) < 75


WEIGHTED = [
    ([10, 10], [1.0, 1.0]),
    ([1000, 10], [1.0, 1.0]),
    ([10, 1000], [0.9, 0.1]),
    ([7, 13, 29], [1.0, 2.0, 3.0]),
    ([100, 1, 50], [0.3, 0.3, 0.4]),
]


@pytest.mark.parametrize(("sizes", "weights"), WEIGHTED)
def test_with_weights_every_source_has_its_share_of_an_epoch_to_one_row(sizes: list[int], weights: list[float]) -> None:
    stream = Stream(sizes, weights, seed=1)
    assert stream.size == sum(sizes)
    for epoch in range(3):
        counts = Counter(source for source, _ in _rows(stream, epoch * stream.size, (epoch + 1) * stream.size))
        for source, weight in enumerate(weights):
            assert abs(counts[source] - weight / sum(weights) * stream.size) < 1


@pytest.mark.parametrize(("sizes", "weights"), WEIGHTED)
def test_with_weights_a_sources_rows_come_equally_often_to_one(sizes: list[int], weights: list[float]) -> None:
    stream = Stream(sizes, weights, seed=1)
    for epochs in (1, 2, 5):
        counts = Counter(_rows(stream, 0, epochs * stream.size))
        for source, size in enumerate(sizes):
            often = [counts[source, row] for row in range(size)]
            assert max(often) - min(often) <= 1


def test_with_weights_a_source_is_shuffled_anew_each_time_it_begins_again() -> None:
    stream = Stream([10, 10], [1.0, 3.0], seed=1)  # 5 rows of the first source per epoch
    halves = [{row for source, row in _rows(stream, 20 * epoch, 20 * epoch + 20) if source == 0} for epoch in range(8)]
    assert all(first | second == set(range(10)) for first, second in zip(halves[::2], halves[1::2], strict=True))
    assert len({frozenset(half) for half in halves[::2]}) > 1


def test_with_weights_sources_of_one_size_have_orders_of_their_own() -> None:
    stream = Stream([100, 100, 200], [1.0, 1.0, 6.0], seed=1)  # 50 rows of each of the first two per epoch
    first, second = ({row for source, row in _rows(stream, 0, 400) if source == wanted} for wanted in (0, 1))
    assert len(first) == len(second) == 50
    assert 10 < len(first & second) < 40


def test_equal_weights_of_equal_sources_are_as_no_weights() -> None:
    assert _rows(Stream([9, 9], [2.0, 2.0], seed=5), 0, 40) == _rows(Stream([9, 9], None, seed=5), 0, 40)


def test_a_share_of_less_than_a_row_is_an_error() -> None:
    line = r"^data\.train: weights .* give a source less than one of the 20 rows per epoch"
    with pytest.raises(InputError, match=line):
        Stream([10, 10], [1.0, 0.001], seed=0)


@pytest.mark.parametrize(("sizes", "weights"), [([7, 5], None), *WEIGHTED])
def test_any_position_alone_is_what_it_is_in_sequence(sizes: list[int], weights: list[float] | None) -> None:
    stream = Stream(sizes, weights, seed=2)
    count = 3 * stream.size
    sequence = _rows(stream, 0, count)
    shuffled = np.random.default_rng(0).permutation(count)[:200]
    assert [tuple(place) for place in stream.at(shuffled).tolist()] == [sequence[i] for i in shuffled]
    assert _rows(stream, stream.size - 3, stream.size + 4) == sequence[stream.size - 3 : stream.size + 4]


def test_no_position_is_no_row() -> None:
    assert Stream([5], None, seed=0).at(np.arange(0)).shape == (0, 2)


def test_ten_billion_rows_take_no_more_memory_than_ten() -> None:
    tracemalloc.start()
    stream = Stream([10**10, 10**9], [0.5, 0.5], seed=0)
    found = stream.at(np.arange(3 * 10**10, 3 * 10**10 + 1000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6
    assert set(found[:, 0].tolist()) == {0, 1}
