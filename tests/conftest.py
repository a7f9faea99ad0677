from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

# read when `datasets` and `huggingface_hub` are imported; ranks and commands that tests start inherit them
_cache = tempfile.TemporaryDirectory(prefix="selfgen-ds-tests-")
os.environ.update(HF_DATASETS_CACHE=_cache.name, HF_HUB_OFFLINE="1")

from tests.ranks import Ranks  # noqa: E402


def pytest_itemcollected(item: pytest.Item) -> None:
    """For `--dist loadgroup`: the tests of a module share fixtures, those of tests/cluster the hosts."""
    group = "cluster" if item.path.parent.name == "cluster" else item.path.stem
    item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.stop()
