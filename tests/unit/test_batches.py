from collections import Counter

import datasets
import pytest
import torch
from torch import Tensor

from selfgen_ds.data.batches import TokenBatch, Windows, collate
from selfgen_ds.data.samples import Samples


@pytest.fixture
def batch() -> TokenBatch:
    """Rows of 5, 3 and 2 tokens; token 0 is both content and padding."""
    return collate([[1, 2], [0], [9]], [[3, 4, 0], [0, 0], [7]], [10, 11, 12])


def test_a_row_is_its_prompt_and_response_padded_on_the_right(batch: TokenBatch) -> None:
    assert batch.target.tolist() == [[1, 2, 3, 4, 0], [0, 0, 0, 0, 0], [9, 7, 0, 0, 0]]


def test_the_context_of_a_collated_batch_is_the_reference(batch: TokenBatch) -> None:
    assert torch.equal(batch.context, batch.target)


def test_lengths_and_sample_ids_are_kept(batch: TokenBatch) -> None:
    assert (batch.lengths.tolist(), batch.sample_ids.tolist()) == ([5, 3, 2], [10, 11, 12])


def test_the_loss_is_on_the_response_and_never_on_prompt_or_padding(batch: TokenBatch) -> None:
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]


def test_every_response_token_but_the_last_is_replaceable(batch: TokenBatch) -> None:
    assert batch.replaceable.int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_nothing_of_a_collated_batch_is_drawn(batch: TokenBatch) -> None:
    assert not batch.drawn.any()


def test_every_tensor_has_its_documented_type(batch: TokenBatch) -> None:
    for ids in (batch.sample_ids, batch.lengths, batch.context, batch.target):
        assert ids.dtype == torch.int64
    for mask in (batch.loss_mask, batch.replaceable, batch.drawn):
        assert (mask.dtype, mask.shape) == (torch.bool, (3, 5))


def test_a_batch_without_rows_can_be_read_but_has_no_targets() -> None:
    empty = collate([], [], [])
    assert empty.context.shape == (1, 2)
    assert not (empty.loss_mask | empty.replaceable | empty.drawn).any()
    assert empty.sample_ids.tolist() == [-1]


def _samples(count: int) -> Samples:
    rows = {
        "sample_id": [100 + i for i in range(count)],
        "prompt_ids": [[1]] * count,
        "response_ids": [[i + 2, 0] for i in range(count)],
    }
    return Samples(rows=datasets.Dataset.from_dict(rows), truncated=0, refused=0)


def _windows(
    count: int = 24,
    *,
    seed: int = 0,
    micro: int = 2,
    accumulation: int = 2,
    rank: int = 0,
    ranks: int = 1,
    epochs: float | None = None,
) -> Windows:
    return Windows(
        _samples(count),
        seed=seed,
        micro_batch_size=micro,
        accumulation=accumulation,
        rank=rank,
        world_size=ranks,
        epochs=epochs,
    )


def _ids(windows: Windows, steps: range) -> list[int]:
    """Sample ids in the order in which one rank sees them."""
    rows = torch.cat([batch.sample_ids for step in steps for batch in windows.window(step)])
    return rows[rows >= 0].tolist()


ALL_24 = list(range(100, 124))


def test_a_window_holds_the_micro_batches_of_one_step() -> None:
    window = _windows(micro=3, accumulation=4).window(0)
    assert [batch.context.shape for batch in window] == [(3, 3)] * 4


def test_a_rows_tokens_come_with_its_sample_id() -> None:
    for batch in _windows().window(3):
        assert (batch.context[:, 1] - 2 + 100).tolist() == batch.sample_ids.tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_visits_every_row_once(ranks: int) -> None:
    steps = range(24 // (4 * ranks))
    seen = [i for rank in range(ranks) for i in _ids(_windows(rank=rank, ranks=ranks), steps)]
    assert sorted(seen) == ALL_24


def test_an_epoch_whose_rows_do_not_fill_the_last_step_goes_on_into_the_next() -> None:
    seen = Counter(_ids(_windows(7), range(7)))  # 7 steps of 4 rows are 4 epochs of 7
    assert set(seen.values()) == {4}


@pytest.mark.parametrize(("ranks", "micro", "accumulation"), [(1, 4, 2), (2, 2, 2), (4, 2, 1), (4, 1, 2), (8, 1, 1)])
def test_a_step_has_the_same_rows_on_any_number_of_ranks(ranks: int, micro: int, accumulation: int) -> None:
    for step in range(6):
        rows = [
            sample_id
            for rank in range(ranks)
            for sample_id in _ids(
                _windows(micro=micro, accumulation=accumulation, rank=rank, ranks=ranks), range(step, step + 1)
            )
        ]
        assert sorted(rows) == sorted(_ids(_windows(micro=8, accumulation=1), range(step, step + 1)))


def test_the_order_changes_with_the_epoch() -> None:
    windows = _windows()
    first, second = _ids(windows, range(6)), _ids(windows, range(6, 12))
    assert first != second
    assert sorted(second) == ALL_24


def test_the_order_changes_with_the_seed() -> None:
    assert _ids(_windows(seed=0), range(6)) != _ids(_windows(seed=1), range(6))


def test_rows_are_shuffled() -> None:
    assert _ids(_windows(), range(6)) != ALL_24


def test_a_resumed_run_sees_the_rows_that_the_uninterrupted_one_would_have() -> None:
    uninterrupted = _windows(10)
    expected = [_ids(uninterrupted, range(step, step + 1)) for step in range(12)]
    for step in (11, 3, 7, 0):
        assert _ids(_windows(10), range(step, step + 1)) == expected[step]
        assert _ids(uninterrupted, range(step, step + 1)) == expected[step]


def test_a_run_of_epochs_ends_with_a_short_window() -> None:
    windows = _windows(5, epochs=2)  # 10 rows: 4, 4, 2
    assert windows.steps() == 3
    assert [len(_ids(windows, range(step, step + 1))) for step in range(4)] == [4, 4, 2, 0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_run_of_epochs_visits_every_row_once_an_epoch(ranks: int) -> None:
    runs = [_windows(7, rank=rank, ranks=ranks, epochs=3) for rank in range(ranks)]
    seen = Counter(i for windows in runs for i in _ids(windows, range(windows.steps())))
    assert seen == dict.fromkeys(range(100, 107), 3)


def test_a_rank_without_rows_left_still_has_its_micro_batches() -> None:
    window = _windows(4, rank=1, ranks=2, micro=2, accumulation=3, epochs=1).window(0)
    assert [batch.sample_ids.tolist().count(-1) for batch in window] == [0, 1, 1]


def test_half_an_epoch_visits_half_of_the_rows_once() -> None:
    windows = _windows(24, epochs=0.5)
    seen = _ids(windows, range(windows.steps()))
    assert len(seen) == len(set(seen)) == 12


@pytest.mark.parametrize(
    ("epochs", "ranks", "steps"), [(1.0, 1, 6), (1.0, 2, 3), (2.5, 1, 15), (1.0, 5, 2), (0.01, 1, 0)]
)
def test_steps_are_as_many_as_the_epochs_take(epochs: float, ranks: int, steps: int) -> None:
    assert _windows(24, ranks=ranks, epochs=epochs).steps() == steps


def test_epochs_done_are_rows_seen_over_rows() -> None:
    windows = _windows(24)  # 4 rows a step
    assert [windows.epoch(step) for step in (0, 3, 6, 60)] == [0.0, 0.5, 1.0, 10.0]


def test_epochs_done_never_pass_the_epochs_of_the_run() -> None:
    windows = _windows(5, epochs=2)
    assert windows.epoch(windows.steps()) == 2.0


def test_a_moved_batch_keeps_its_values(batch: TokenBatch) -> None:
    moved = batch.to("cpu")
    for name, value in vars(batch).items():
        assert isinstance(value, Tensor)
        assert torch.equal(getattr(moved, name), value)
