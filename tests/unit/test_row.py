import datasets
import numpy as np

from selfgen_ds.data.batches import collate
from selfgen_ds.data.row import RowReader, TrainingRow

TWO_TURNS = TrainingRow.reference(7, np.arange(30, 39), np.array([[2, 3, 4], [4, 7, 8]]))


def test_the_row_of_teacher_forcing_reads_and_learns_the_reference() -> None:
    assert TWO_TURNS.context_ids.tolist() == TWO_TURNS.target_ids.tolist() == list(range(30, 39))
    assert TWO_TURNS.loss_mask.astype(int).tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0]
    assert TWO_TURNS.replaceable_mask.astype(int).tolist() == [0, 0, 1, 0, 1, 1, 1, 0, 0]
    assert (TWO_TURNS.replaced_mask.any(), TWO_TURNS.answer_equal, TWO_TURNS.sample_id) == (False, False, 7)
    assert len(TWO_TURNS) == 9


def test_the_last_response_starts_where_its_turn_does_even_if_another_one_ends_there() -> None:
    assert TWO_TURNS.prompt_ids.tolist() == [30, 31, 32, 33]
    assert TWO_TURNS.response_ids.tolist() == [34, 35, 36, 37]


def test_without_turns_the_last_response_is_the_last_run_of_the_loss_mask() -> None:
    ids, nothing = np.arange(6), np.zeros(6, bool)
    row = TrainingRow(
        sample_id=0,
        context_ids=ids + 10,
        target_ids=ids,
        loss_mask=np.array([0, 1, 0, 1, 1, 1], bool),
        replaceable_mask=nothing,
        replaced_mask=nothing,
    )
    assert (row.prompt_ids.tolist(), row.response_ids.tolist()) == ([0, 1, 2], [3, 4, 5])


def test_a_batch_of_one_row_is_the_row() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        length = int(rng.integers(3, 20))
        masks = rng.random((3, length)) < 0.5
        row = TrainingRow(
            sample_id=3,
            context_ids=rng.integers(0, 150_000, length),
            target_ids=rng.integers(0, 150_000, length),
            loss_mask=masks[0],
            replaceable_mask=masks[1],
            replaced_mask=masks[2],
        )
        batch = collate([[row]])
        for name in ("context_ids", "target_ids", "loss_mask", "replaceable_mask", "replaced_mask"):
            assert getattr(batch, name)[0].tolist() == getattr(row, name).tolist()
        assert batch.sample_ids.tolist() == [[3] * length]


def test_a_reader_reads_what_the_table_holds_in_any_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"ids": rng.integers(0, 9, n).tolist(), "mask": (rng.random(n) < 0.5).tolist(), "number": n, "equal": n > 2}
        for n in (3, 0, 1, 5, 2, 0, 4)
    ]
    lists = {"ids": datasets.List(datasets.Value("int32")), "mask": datasets.List(datasets.Value("bool"))}
    features = datasets.Features(lists | {"number": datasets.Value("int64"), "equal": datasets.Value("bool")})
    parts = [datasets.Dataset.from_list(part, features=features) for part in (rows[:3], rows[3:4], rows[4:])]
    reader = RowReader(datasets.concatenate_datasets(parts))
    for number in (6, 0, 3, 2, 1, 5, 4, 0):
        row = reader[number]
        assert (row["ids"].dtype, row["mask"].dtype) == (np.int64, bool)
        assert {name: np.asarray(value).tolist() for name, value in row.items()} == rows[number]
