"""The rows of a pilot: drawn at random, kept whole, and held out by their prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.config import DataConfig, Source
from selfgen_ds.data.encoding import Format
from selfgen_ds.data.row_checks import Columns
from selfgen_ds.data.rows import open_source
from selfgen_ds.data.samples import load
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.pilot.rows import PilotRows, draw, kinds, some_rows


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"q{i}", "completion": f"a{i}", "kind": i % 3} for i in range(start, start + count)]


def _fields(sources: list[Source]) -> list[dict[str, Any]]:
    files = [file for source in sources for file in sorted(Path(source.path).iterdir())]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def _draw(data: DataConfig, folder: Path, rows: int = 20, held_out: int = 10, seed: int = 0) -> PilotRows:
    return draw(data, rows, held_out, seed, folder)


def test_rows_are_drawn_with_all_of_their_fields_and_none_is_on_both_sides(tmp_path: Path) -> None:
    data = DataConfig(train=_write(tmp_path / "rows.jsonl", _pairs(100)))
    drawn = _draw(data, tmp_path / "data")
    trained, evaluated = _fields(drawn.train), _fields(drawn.held_out)
    assert (drawn.whole, drawn.trained, drawn.evaluated) == (100, len(trained), len(evaluated)) == (100, 20, 10)
    assert {row["prompt"] for row in trained}.isdisjoint(row["prompt"] for row in evaluated)
    assert all(row in _pairs(100) for row in trained + evaluated)
    assert kinds("kind", drawn) == [str(row["kind"]) for row in evaluated]


def test_every_row_may_be_drawn_and_the_seed_decides_which(tmp_path: Path) -> None:
    data = DataConfig(train=_write(tmp_path / "rows.jsonl", _pairs(40)))
    by_seed = [_fields(_draw(data, tmp_path / str(seed), seed=seed).train) for seed in range(12)]
    assert {row["prompt"] for rows in by_seed for row in rows} == {f"q{i}" for i in range(40)}
    assert _fields(_draw(data, tmp_path / "again", seed=3).train) == by_seed[3]


def test_rows_that_are_there_are_not_drawn_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    data = DataConfig(train=_write(path, _pairs(40)))
    first = _draw(data, tmp_path / "data")
    path.unlink()
    assert _draw(data, tmp_path / "data") == first


def test_rows_that_share_a_prompt_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i // 4}", "completion": f"a{i}"} for i in range(60)]
    drawn = _draw(DataConfig(train=_write(tmp_path / "rows.jsonl", rows)), tmp_path / "data", rows=50)
    trained, evaluated = ({row["prompt"] for row in _fields(part)} for part in (drawn.train, drawn.held_out))
    assert trained.isdisjoint(evaluated)
    assert drawn.evaluated == 10
    assert drawn.trained == 48, "the last group held out has two rows more than are needed"


def test_conversations_share_a_prompt_if_they_differ_in_the_last_answer_alone(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i // 2}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(40)
    ]
    drawn = _draw(DataConfig(train=_write(tmp_path / "rows.jsonl", rows)), tmp_path / "data")
    asked = [{row["messages"][0]["content"] for row in _fields(part)} for part in (drawn.train, drawn.held_out)]
    assert asked[0].isdisjoint(asked[1])


def test_one_prompt_in_most_rows_cannot_be_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": "the same", "completion": f"a{i}"} for i in range(60)]
    with pytest.raises(InputError, match="there are 1 prompts, one of them in 60 of 60 rows"):
        _draw(DataConfig(train=_write(tmp_path / "rows.jsonl", rows)), tmp_path / "data", rows=50)


def test_held_out_rows_come_from_the_evaluation_data_if_there_are_any(tmp_path: Path) -> None:
    train, evaluation = _write(tmp_path / "train.jsonl", _pairs(30)), _write(tmp_path / "eval.jsonl", _pairs(15, 1000))
    drawn = _draw(DataConfig(train=train, eval=evaluation), tmp_path / "data")
    assert {row["prompt"] for row in _fields(drawn.held_out)} < {f"q{i}" for i in range(1000, 1015)}
    assert drawn.trained == 20


def test_fewer_rows_than_are_asked_for_are_an_error_that_counts_them(tmp_path: Path) -> None:
    train, evaluation = _write(tmp_path / "train.jsonl", _pairs(29)), _write(tmp_path / "eval.jsonl", _pairs(9, 1000))
    with pytest.raises(InputError, match=r"at least 30 rows \(--rows 20 and --held_out 10\), got 29"):
        _draw(DataConfig(train=train), tmp_path / "data")
    with pytest.raises(InputError, match=r"data.eval: expected at least 10 rows \(--held_out\), got 9"):
        _draw(DataConfig(train=train, eval=evaluation), tmp_path / "data")


def test_rows_that_cannot_be_used_are_named_unless_the_recipe_allows_for_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    _write(path, [*_pairs(40), {"prompt": "no completion"}])
    with path.open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    with pytest.raises(InputError, match=r"line 41: field 'completion' is missing.*\n.*line 42: .*malformed JSON"):
        _draw(DataConfig(train=str(path)), tmp_path / "data")
    _write(tmp_path / "other.jsonl", [*_pairs(40), *[{"prompt": "no completion"}] * 13])
    with pytest.raises(InputError, match=r"line 50: field 'completion' is missing.*\nand 3 more rows$"):
        _draw(DataConfig(train=str(tmp_path / "other.jsonl")), tmp_path / "other")
    drawn = _draw(DataConfig(train=str(path), max_refused_share=0.05), tmp_path / "data", rows=30)
    assert (drawn.whole, drawn.trained, drawn.evaluated) == (40, 30, 10)


@pytest.mark.parametrize(("name", "text"), [("rows.txt", "a row"), ("rows.jsonl", "\n\n")])
def test_files_of_another_format_or_without_rows_are_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(
        InputError, match=r"rows.txt: expected a file that ends in|data.train: expected at least 30 rows"
    ):
        _draw(DataConfig(train=str(tmp_path / name)), tmp_path / "data")


def test_sources_keep_their_columns_and_weights(tmp_path: Path) -> None:
    other = [{"question": f"p{i}", "answer": "x"} for i in range(100)]
    sources: list[str | Source] = [
        Source(path=_write(tmp_path / "a.jsonl", _pairs(100)), weight=3.0),
        Source(
            path=_write(tmp_path / "b.jsonl", other), weight=1.0, prompt_column="question", completion_column="answer"
        ),
    ]
    drawn = _draw(DataConfig(train=sources), tmp_path / "data", rows=30, held_out=10)
    assert [source.weight for source in drawn.train] == [3.0, 1.0]
    assert drawn.train[1].prompt_column == "question"
    assert [source.weight for source in drawn.held_out] == [None, None]
    counts = [len(_fields([source])) for source in drawn.train]
    held = [len(_fields([source])) for source in drawn.held_out]
    assert [a + b for a, b in zip(counts, held, strict=True)] == [30, 10]
    few = some_rows(drawn, 8, tmp_path / "few")
    assert [source.weight for source in few] == [None, None]
    assert [len(_fields([source])) for source in few] == [-(-8 * count // 30) for count in counts]


def test_files_of_a_folder_keep_their_forms_and_their_names_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}] for i in range(30)]
    spoken = [{"messages": messages, "kind": "spoken"} for messages in turns]
    _write(folder / "a.jsonl", _pairs(30))
    _write(folder / "b.jsonl", spoken)
    drawn = _draw(DataConfig(train=str(folder)), tmp_path / "data", rows=30, held_out=15)
    for part in (drawn.train, drawn.held_out):
        (opened,) = (open_source(source, "train", Columns()) for source in part)
        forms = [isinstance(row, Conversation) for row in opened.rows]
        assert forms == [row["kind"] == "spoken" for row in _fields(part)] == sorted(forms)
        assert set(forms) == {False, True}
    assert kinds("kind", drawn) == [str(row["kind"]) for row in _fields(drawn.held_out)]
    _write(folder / "b.jsonl", [{"messages": [], "kind": "spoken"}])
    with pytest.raises(InputError, match=r"rows/b.jsonl, line 1"):
        _draw(DataConfig(train=str(folder)), tmp_path / "more")


def test_equal_weights_of_three_sources_give_as_many_rows_as_are_asked_for(tmp_path: Path) -> None:
    sources: list[str | Source] = [
        Source(path=_write(tmp_path / f"{name}.jsonl", _pairs(100, 100 * name)), weight=1.0) for name in range(3)
    ]
    drawn = _draw(DataConfig(train=sources), tmp_path / "data", rows=40, held_out=10)
    assert (drawn.trained, drawn.evaluated) == (40, 10)


def test_a_source_with_fewer_rows_than_its_weight_asks_for_gives_all_of_them(tmp_path: Path) -> None:
    sources: list[str | Source] = [
        Source(path=_write(tmp_path / "small.jsonl", _pairs(5)), weight=1.0),
        Source(path=_write(tmp_path / "large.jsonl", _pairs(100, 1000)), weight=1.0),
    ]
    drawn = _draw(DataConfig(train=sources), tmp_path / "data", rows=30, held_out=10)
    assert (drawn.trained, drawn.evaluated) == (30, 10)
    assert sum(int(row["prompt"][1:]) < 5 for row in _fields(drawn.train) + _fields(drawn.held_out)) == 5


def test_without_weights_larger_sources_give_more_rows(tmp_path: Path) -> None:
    sources: list[str | Source] = [
        _write(tmp_path / "a.jsonl", _pairs(900)),
        _write(tmp_path / "b.jsonl", _pairs(100, 1000)),
    ]
    drawn = _draw(DataConfig(train=sources), tmp_path / "data", rows=190, held_out=10)
    of_larger = len(_fields([drawn.train[0]]))
    assert 150 < of_larger < 190


@pytest.mark.parametrize("task", ["builtin:sort", "builtin:pointer_chase/dev"])
def test_built_in_tasks_are_written_as_rows_of_two_texts(task: str, tmp_path: Path) -> None:
    data = DataConfig(train=task, prompt_column="question")
    drawn = _draw(data, tmp_path / "data")
    tokenizer = byte_tokenizer()
    samples = load([*drawn.train], "train", tokenizer, Format(max_length=128))
    assert sum(map(len, samples)) == 20


def test_values_that_json_has_not_are_written_as_text(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**row, "day": datetime.date(2026, 1, 1 + i % 20)} for i, row in enumerate(_pairs(40))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    drawn = _draw(DataConfig(train=str(tmp_path / "rows.parquet")), tmp_path / "data")
    assert all(row["day"].startswith("2026-01-") for row in _fields(drawn.train))
