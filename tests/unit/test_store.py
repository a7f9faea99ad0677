import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from selfgen_ds.data.row import TrainingRow
from selfgen_ds.errors import InputError
from selfgen_ds.rounds.store import AUDIT, StoredRows, Writer, broken_files, load_table, read_audit

COLUMNS = ("context_ids", "target_ids", "loss_mask", "replaced_mask")


def _rows(seed: int, count: int = 5, first_id: int = 0) -> list[TrainingRow]:
    """Return rows of several turns in which some tokens are drawn."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(rng.integers(3, 20))
        ids = rng.integers(0, 150_000, length)
        loss_mask = (rng.random(length) < 0.6) & (np.arange(length) > 0)
        drawn = loss_mask & (rng.random(length) < 0.5)
        context = np.where(drawn & (rng.random(length) < 0.5), ids + 1, ids)
        rows.append(
            TrainingRow(
                sample_id=first_id + number,
                context_ids=context,
                target_ids=ids,
                loss_mask=loss_mask,
                replaceable_mask=np.zeros(length, bool),
                replaced_mask=drawn,
                answer_equal=bool(number % 2),
            )
        )
    return rows


def _rows_of(table: datasets.Dataset) -> StoredRows:
    return StoredRows(table, np.arange(len(table)))


def _audit(**changes: Any) -> dict[str, Any]:
    return {
        "method": "bash",
        "round": 1,
        "replace_probability": 0.1 + 0.2,
        "settings": {"passes": None, "reject": ["a"], "temperature": 1.0, "seed": 3},
        "fingerprint": {"model": "m", "tokenizer": "t", "data": "d", "weights": "w"},
        "versions": {"torch": "2"},
        "started": "2026-01-01T00:00:00+00:00",
        "chunk_size": 5,
    } | changes


def _complete(folder: Path, chunks: int = 3, **audit: Any) -> list[TrainingRow]:
    """Write a complete round and return its rows."""
    writer = Writer(folder)
    begun = writer.start(_audit(**audit))
    rows = [_rows(chunk, first_id=5 * chunk) for chunk in range(chunks)]
    for chunk in reversed(range(chunks)):
        writer.write(chunk, rows[chunk], {"passes": chunk + 1, "rejected_rows": chunk}, 0.5)
    writer.finish(chunks, begun)
    return [row for some in rows for row in some]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "rollouts" / "round-01"


def _equal(row: TrainingRow, other: TrainingRow) -> bool:
    return (row.sample_id, row.answer_equal) == (other.sample_id, other.answer_equal) and all(
        np.array_equal(getattr(row, name), getattr(other, name)) for name in COLUMNS
    )


# --- a whole round ---


def test_every_file_is_on_the_disk_before_it_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync

    def fsync(file: int) -> None:
        sync(file)
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), folder.parent))

    monkeypatch.setattr(os, "fsync", fsync)
    writer = Writer(folder)
    audit = writer.start(_audit())
    synced.clear()
    writer.write(0, _rows(0), {}, 0.5)
    rows, counts, names = synced
    assert rows == f"{folder.name}.partial/rows-000000.arrow"
    assert counts.startswith(f"{folder.name}.partial/.rows-000000.json")
    assert names == f"{folder.name}.partial"
    synced.clear()
    writer.finish(1, audit)
    for name in (f".{AUDIT}.", "dataset_info.json", ".state.json."):
        assert any(Path(path).name.startswith(name) for path in synced), name
    assert synced[-1] == "."  # the folder in which the round has its name


def test_what_is_written_is_read_back_in_the_order_of_the_chunks(folder: Path) -> None:
    rows = _complete(folder)
    table = load_table(folder)
    assert len(table) == 15
    assert all(_equal(_rows_of(table)[i], row) for i, row in enumerate(rows))
    for numbers in (np.arange(15), np.array([3, 4, 11])):
        stored = StoredRows(table, numbers)
        assert len(stored) == len(numbers)
        some = np.array([2, 0])
        assert stored.lengths(some).tolist() == [len(rows[numbers[i]].context_ids) for i in some]
        assert stored.lengths(some).dtype == np.int64
        for i, number in enumerate(numbers):
            sample = stored[i]
            assert _equal(sample, rows[number])
            assert not sample.replaceable_mask.any()
            assert (sample.context_ids.dtype, sample.sample_id) == (np.int64, number)


def test_the_folder_is_an_ordinary_dataset(folder: Path) -> None:
    rows = _complete(folder)
    table = datasets.load_from_disk(str(folder))
    assert table.column_names == ["sample_id", *COLUMNS, "answer_equal"]
    for found, row in zip(table, rows, strict=True):
        assert {name: found[name] for name in COLUMNS} == {name: getattr(row, name).tolist() for name in COLUMNS}
        assert len({len(found[name]) for name in COLUMNS}) == 1
        outside = [i for i, drawn in enumerate(found["replaced_mask"]) if not drawn]
        assert [found["context_ids"][i] for i in outside] == [found["target_ids"][i] for i in outside]
    assert {path.name for path in folder.iterdir()} == {
        *(f"rows-{chunk:06d}.arrow" for chunk in range(3)),
        *("dataset_info.json", "state.json", AUDIT),
    }


def test_a_dataset_of_one_round_is_not_taken_for_another_rounds(tmp_path: Path) -> None:
    _complete(tmp_path / "round-01")
    _complete(tmp_path / "round-02", round=2)  # drawn by the same weights
    first, second = (datasets.load_from_disk(str(tmp_path / name)) for name in ("round-01", "round-02"))
    assert first._fingerprint != second._fingerprint


def test_the_record_says_what_drew_the_round_and_how_much_of_it(folder: Path) -> None:
    rows = _complete(folder)
    audit = read_audit(folder)
    assert {name: audit[name] for name in _audit()} == _audit()
    assert audit["passes"] == 3
    assert audit["counts"] == {
        "rows": 15,
        "drawn_tokens": sum(int(row.replaced_mask.sum()) for row in rows),
        "differing_tokens": sum(int((row.context_ids != row.target_ids).sum()) for row in rows),
        "rows_with_drawn_tokens": sum(bool(row.replaced_mask.any()) for row in rows),
        "equal_answers": sum(row.answer_equal for row in rows),
        "rejected_rows": 3,
    }


def test_a_chunk_may_come_to_nothing(folder: Path) -> None:
    writer = Writer(folder)
    audit = writer.start(_audit())
    writer.write(0, [], {}, 0.5)
    writer.write(1, _rows(1), {}, 0.5)
    assert writer.finish(2, audit)["counts"]["rows"] == 5
    assert len(load_table(folder)) == 5


# --- a writer that was killed ---


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_round_continues_at_the_missing_chunks(folder: Path, tmp_path: Path) -> None:
    expected = _complete(tmp_path / "whole")
    killed = Writer(folder)
    killed.start(_audit())
    killed.write(1, expected[5:10], {"passes": 2, "rejected_rows": 1}, 0.5)
    killed.write(2, expected[10:], {"passes": 3, "rejected_rows": 2}, 0.5)
    (killed.partial / "rows-000002.json").unlink()  # killed before its counts were written
    arrow = killed.partial / "rows-000002.arrow"
    arrow.write_bytes(arrow.read_bytes()[:100])
    (killed.partial / "rows-000000.arrow").write_bytes(b"")
    (killed.partial / ".rows-000000.json.123.tmp").write_bytes(b'{"rows"')

    writer = Writer(folder)
    # another number of ranks would choose another chunk size; the first one stays
    audit = writer.start(_audit(chunk_size=7, started="later"))
    assert audit == _audit()
    assert writer.missing(3) == [0, 2]
    writer.write(0, expected[:5], {"passes": 1, "rejected_rows": 0}, 0.5)
    assert writer.missing(3) == [2]
    writer.write(2, expected[10:], {"passes": 3, "rejected_rows": 2}, 0.5)
    writer.finish(3, audit)
    assert all(_equal(_rows_of(load_table(folder))[i], row) for i, row in enumerate(expected))
    assert read_audit(folder) == read_audit(tmp_path / "whole")
    whole = _files(tmp_path / "whole")
    assert {name: content for name, content in _files(folder).items() if name in whole} == whole


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_chunk_that_is_not_as_it_was_written_is_drawn_again(folder: Path) -> None:
    writer = Writer(folder)
    writer.start(_audit())
    for chunk in range(3):
        writer.write(chunk, _rows(chunk), {}, 0.5)
    _flip(writer.partial / "rows-000001.arrow")
    assert Writer(folder).missing(3) == [1]


def test_of_a_round_that_is_not_as_it_was_written_the_file_is_named(folder: Path) -> None:
    _complete(folder)
    assert broken_files(folder) == []
    _flip(folder / "rows-000002.arrow")
    assert broken_files(folder) == ["rows-000002.arrow"]


@pytest.mark.parametrize("done", ["chunks", "info", "state"])
def test_a_round_that_was_stopped_at_its_end_is_finished(folder: Path, done: str) -> None:
    expected = _complete(folder)
    files, counts = read_audit(folder)["files"], {"rows": 5, "passes": 1}
    folder.rename(folder.with_name("round-01.partial"))
    for chunk in range(3):
        written = {"file": files[f"rows-{chunk:06d}.arrow"], "counts": counts, "seconds": 0.5}
        (Writer(folder).partial / f"rows-{chunk:06d}.json").write_text(json.dumps(written))
    for name in {"chunks": ["state.json", "dataset_info.json"], "info": ["state.json"], "state": []}[done]:
        (Writer(folder).partial / name).unlink()
    writer = Writer(folder)
    audit = writer.start(_audit())
    assert writer.missing(3) == []
    assert writer.finish(3, audit)["counts"] == {"rows": 15}
    assert len(load_table(folder)) == len(expected)
    assert not writer.partial.exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"fingerprint": {"model": "m", "tokenizer": "t", "data": "d", "weights": "others"}},
        {"settings": {"passes": 1, "reject": ["a"], "temperature": 1.0, "seed": 3}},
        {"replace_probability": 0.3},
        {"versions": {"torch": "3"}},
        {"method": "rac"},
    ],
)
def test_chunks_of_other_weights_or_settings_are_drawn_anew(
    folder: Path, changed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    before = Writer(folder)
    before.start(_audit())
    before.write(0, _rows(0), {}, 0.5)
    writer = Writer(folder)
    assert writer.start(_audit(**changed)) == _audit(**changed)
    assert "was begun by other weights or settings" in caplog.text
    assert writer.missing(2) == [0, 1]
    assert _files(writer.partial).keys() == {AUDIT}


def test_a_folder_without_a_record_is_begun_anew(folder: Path) -> None:
    partial = Writer(folder).partial
    partial.mkdir(parents=True)
    (partial / "rows-000000.json").write_text("{}")
    assert Writer(folder).start(_audit()) == _audit()
    assert Writer(folder).missing(1) == [0]


# --- damaged and foreign folders ---


def _cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _foreign(folder: Path) -> None:
    shutil.rmtree(folder)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder)


def _several(folder: Path) -> None:
    audit = (folder / AUDIT).read_text()
    shutil.rmtree(folder)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(folder)
    (folder / AUDIT).write_text(audit)


def _others(folder: Path) -> None:
    other = Writer(folder.with_name("other"))
    other.start(_audit())
    other.write(0, _rows(9, 2), {}, 0.5)
    shutil.copy(other.partial / "rows-000000.arrow", folder / "rows-000001.arrow")


DAMAGE = {
    "no chunk": lambda folder: (folder / "rows-000001.arrow").unlink(),
    "an empty chunk": lambda folder: (folder / "rows-000001.arrow").write_bytes(b""),
    "a chunk cut early": lambda folder: _cut(folder / "rows-000001.arrow", 0.1),
    "a chunk cut late": lambda folder: _cut(folder / "rows-000001.arrow", 0.7),
    "a chunk without its end": lambda folder: _cut(folder / "rows-000001.arrow", 0.99),
    "another chunk's rows": _others,
    "a record without counts": lambda folder: (folder / AUDIT).write_text(json.dumps(_audit())),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "state that is no JSON": lambda folder: _cut(folder / "state.json", 0.5),
    "no info": lambda folder: (folder / "dataset_info.json").unlink(),
    "a foreign dataset": _foreign,
    "several datasets": _several,
    "another file": lambda folder: (folder / "rows-000001.arrow").write_bytes(b"PAR1" * 100),
    "nothing": lambda folder: shutil.rmtree(folder),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_or_foreign_folder_is_one_clear_line(folder: Path, damage: Any) -> None:
    _complete(folder)
    damage(folder)
    with pytest.raises(InputError) as caught:
        load_table(folder)
    assert str(caught.value).startswith(f"{folder}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "{", "[1, 2]", "{}", "\udcff"])
def test_a_record_that_is_none_is_one_clear_line(folder: Path, content: str | None) -> None:
    folder.mkdir(parents=True)
    if content is not None:
        (folder / AUDIT).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"round\.json: not the record of a round$"):
        read_audit(folder)
