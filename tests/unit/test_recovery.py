from pathlib import Path

import datasets
import pytest

from selfgen_ds.config import Source
from selfgen_ds.data.encoding import Format
from selfgen_ds.data.samples import Samples, load
from selfgen_ds.data.tasks import forced_error_texts
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.evaluation.recovery import ForcedError, forced_errors, second_choice, slip_statistics
from tests.batches import sample

TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _load(*paths: str, limit: int | None = None) -> list[Samples]:
    return load([Source(path=path) for path in paths], "test", TOKENIZER, Format(max_length=64, limit=limit))


def test_every_row_of_a_task_has_its_forced_error_as_tokens() -> None:
    samples = _load("builtin:running_sum", "builtin:pointer_chase", limit=6)
    errors = forced_errors(samples, TOKENIZER)
    for source in samples:
        texts = forced_error_texts(source.name.removeprefix("builtin:"))
        for number in range(len(source)):
            row = source[number]
            error = errors[row.sample_id]
            assert error.start_ids == TOKENIZER(texts[number].start)["input_ids"]
            assert error.rest_ids == [*TOKENIZER(texts[number].rest)["input_ids"], TOKENIZER.eos_token_id]
            response = row.response_ids.tolist()
            assert error.start_ids[:-1] == response[: len(error.start_ids) - 1]
            assert error.start_ids[-1] != response[len(error.start_ids) - 1]
            assert error.rest_ids == response[len(error.start_ids) :]


def test_rows_of_a_file_have_no_forced_error_even_beside_a_task(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert forced_errors(_load(str(tmp_path / "rows.jsonl")), TOKENIZER) == {}
    assert forced_errors(_load("builtin:running_sum", str(tmp_path / "rows.jsonl")), TOKENIZER) == {}


def test_on_other_data_the_error_is_the_models_second_choice_where_its_first_is_right() -> None:
    row = sample([7], [1, 2, 3, 4, 9], 0)  # 9 ends the answer
    best, second = [1, 2, 8, 4, 9], [5, 6, 3, 7, 1]
    wrong = second_choice(row, 0.25, best, second)
    assert wrong == ForcedError(start_ids=[1, 6], rest_ids=[3, 4, 9], closing=1)
    wrong = second_choice(row, 0.5, best, second)  # the most probable token is wrong itself
    assert wrong == ForcedError(start_ids=[1, 2, 8], rest_ids=[4, 9], closing=1)
    assert second_choice(row, 0.75, best, second) is None, "no token of the answer follows"


def test_what_follows_the_first_slip_is_counted_and_late_slips_are_not() -> None:
    right = [
        [True, False, True, False, True, True, True],  # slips at the second token
        [True, True, True, False, True, True, True],  # slips among the last four
        [True] * 7,
    ]
    statistics = slip_statistics(right, [True, False, None])
    assert statistics["slips"] == [1.0, 3.0]
    assert statistics["after_slip_1"] == [1.0, 1.0]
    assert statistics["after_slip_4"] == [0.75, 1.0]
    assert statistics["after_slip_last"] == [1.0, 1.0]
    assert statistics["after_slip_final_answer"] == [1.0, 1.0]


def test_rows_too_short_for_a_slip_do_not_count_as_rows_without_one() -> None:
    assert slip_statistics([[False] * 4, [False]], [False, False])["slips"] == [0.0, 0.0]
    assert slip_statistics([[False] * 4, [True] * 5, [False] * 5], [None] * 3)["slips"] == [1.0, 2.0]
