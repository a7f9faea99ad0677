"""Tests of the file hashes that the cache keeps between runs."""

import hashlib
import os
import time
from pathlib import Path

import datasets
import pytest

from selfgen_ds.data.cache import content_hash
from selfgen_ds.errors import InputError

OLD = time.time() - 1000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "selfgen_ds"


def _write(path: Path, content: bytes, changed: float = OLD) -> Path:
    path.write_bytes(content)
    os.utime(path, (changed, changed))
    return path


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_files_hash_is_the_sha256_of_its_content(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    path = _write(tmp_path / "rows", content)
    assert content_hash(path) == content_hash(path) == _sha256(content)


def test_a_file_is_read_once_as_long_as_its_size_and_time_stay(tmp_path: Path) -> None:
    content_hash(_write(tmp_path / "rows", b"one"))
    assert content_hash(_write(tmp_path / "rows", b"two")) == _sha256(b"one")


@pytest.mark.parametrize(("content", "changed"), [(b"longer", OLD), (b"two", OLD + 1e-3)], ids=["size", "time"])
def test_another_size_or_time_is_another_content(tmp_path: Path, content: bytes, changed: float) -> None:
    content_hash(_write(tmp_path / "rows", b"one"))
    assert content_hash(_write(tmp_path / "rows", content, changed)) == _sha256(content)


def test_files_of_the_same_size_and_time_are_told_apart(tmp_path: Path) -> None:
    hashes = [content_hash(_write(tmp_path / name, name.encode())) for name in ("one", "two")]
    assert hashes == [_sha256(b"one"), _sha256(b"two")]


def test_a_file_is_the_same_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content_hash(_write(tmp_path / "rows", b"one"))
    _write(tmp_path / "rows", b"two")
    monkeypatch.chdir(tmp_path)
    assert content_hash(Path("rows")) == _sha256(b"one")


def test_the_hash_of_a_file_that_may_still_change_is_not_kept(tmp_path: Path, cache: Path) -> None:
    now = time.time()
    for content in (b"one", b"two"):
        assert content_hash(_write(tmp_path / "rows", content, now)) == _sha256(content)
    assert not list(cache.glob("*.sha256"))


def test_a_file_that_has_gone_and_a_cache_that_cannot_be_written_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        content_hash(tmp_path / "rows")
    path = _write(tmp_path / "rows", b"one")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
    with pytest.raises(InputError, match=r"^HF_DATASETS_CACHE: "):
        content_hash(path)
