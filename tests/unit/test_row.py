import numpy as np

from selfgen_ds.data.batches import collate
from selfgen_ds.data.row import TrainingRow

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
