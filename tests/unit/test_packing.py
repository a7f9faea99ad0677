import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfgen_ds.data import order
from selfgen_ds.data.encoding import Format
from selfgen_ds.data.packing import load_packs, pack
from selfgen_ds.data.row_checks import TextPair
from selfgen_ds.data.rows import Opened
from selfgen_ds.data.samples import Samples, load_samples
from selfgen_ds.data.tokenizer import byte_tokenizer


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _samples(lengths: list[int], max_length: int) -> Samples:
    """Make samples of the given lengths, each at least 3 tokens."""
    rows = [TextPair(prompt="p", completion="c" * (length - 2)) for length in lengths]
    opened = Opened(name="rows.jsonl", fingerprint=[json.dumps(lengths)], rows=rows)
    return load_samples(opened, byte_tokenizer(), Format(max_length=max_length))


def _gsm8k_like(count: int) -> list[int]:
    """Draw lengths that are spread like GSM8K's rows in tokens: log-normal with median 150."""
    lengths = np.random.default_rng(0).lognormal(np.log(150), 0.4, count)
    return np.clip(lengths.astype(int), 3, 512).tolist()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), capacity=st.integers(1, 60))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(data: st.DataObject, capacity: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    rows = pack(lengths, capacity)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    filled = [sum(lengths[sample] for sample in row) for row in rows]
    assert all(0 < tokens <= capacity for tokens in filled)
    # no two rows would fit into one
    assert sum(tokens * 2 <= capacity for tokens in filled) <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 30), max_size=60))
def test_packing_is_best_fit_decreasing(lengths: list[int]) -> None:
    rows: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [30 - sum(lengths[i] for i in row) for row in rows]
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= lengths[sample]]
        if fitting:
            rows[min(fitting)[1]].append(sample)
        else:
            rows.append([sample])
    assert pack(lengths, 30) == rows


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([5, 3, 2, 5], [[0, 3], [1, 2]]),
        ([10, 10], [[0], [1]]),
        ([4, 4, 2, 6, 4], [[3, 0], [1, 4, 2]]),
        ([1] * 10, [list(range(10))]),
        ([], []),
    ],
)
def test_samples_that_fit_exactly_fill_a_row(lengths: list[int], rows: list[list[int]]) -> None:
    assert pack(lengths, 10) == rows


def test_rows_of_gsm8k_lengths_are_nearly_full() -> None:
    lengths = _gsm8k_like(7473)
    rows = pack(lengths, 512)
    assert sum(lengths) / (512 * len(rows)) > 0.98


def test_a_sources_rows_hold_every_sample_once_and_are_full() -> None:
    lengths = _gsm8k_like(1000)
    samples = _samples(lengths, 512)
    packs = load_packs(samples, 512)
    members = [row["indices"] for row in packs]
    assert sorted(sample for row in members for sample in row) == list(range(1000))
    assert max(sum(lengths[sample] for sample in row) for row in members) <= 512
    assert sum(lengths) / (512 * len(members)) > 0.97


def test_samples_are_packed_pool_by_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfgen_ds.data.packing._POOL", 64)
    lengths = _gsm8k_like(300)
    members = [row["indices"] for row in load_packs(_samples(lengths, 512), 512)]
    assert sorted(sample for row in members for sample in row) == list(range(300))
    assert max(sum(lengths[sample] for sample in row) for row in members) <= 512
    # a pool is a random part of all samples, not a range of the file
    assert max(members[0]) - min(members[0]) > 64


def test_one_sample_is_one_row() -> None:
    assert [row["indices"] for row in load_packs(_samples([5], 9), 9)] == [[0]]


def test_rows_are_made_once_and_mapped_from_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = _samples(_gsm8k_like(50), 512)
    first = load_packs(samples, 512)

    def again(*_: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr("selfgen_ds.data.packing.pack", again)
    second = load_packs(samples, 512)
    assert list(first) == list(second)
    [path] = samples.folder.glob("packs-*.arrow")
    assert [file["filename"] for file in second.cache_files] == [str(path)]


def test_rows_of_other_packing_code_are_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    samples = _samples([5, 4, 3], 9)
    load_packs(samples, 9)
    (tmp_path / "order.py").write_text("other")
    monkeypatch.setattr(order, "__file__", str(tmp_path / "order.py"))
    load_packs(samples, 9)
    assert len(list(samples.folder.glob("packs-*.arrow"))) == 2


def test_rows_are_the_same_in_every_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list(load_packs(_samples(_gsm8k_like(50), 512), 512))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    assert list(load_packs(_samples(_gsm8k_like(50), 512), 512)) == first


def test_a_partial_file_of_packs_is_replaced() -> None:
    samples = _samples([5, 4, 3], 9)
    load_packs(samples, 9)
    [path] = samples.folder.glob("packs-*.arrow")
    path.rename(path.with_suffix(".partial")).write_bytes(b"half")
    assert [row["indices"] for row in load_packs(samples, 9)] == [[0, 1], [2]]
