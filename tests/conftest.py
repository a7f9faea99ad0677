from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# read when `datasets` and `huggingface_hub` are imported; ranks and commands that tests start inherit them
_cache = tempfile.TemporaryDirectory(prefix="selfgen-ds-tests-")
os.environ.update(HF_DATASETS_CACHE=_cache.name, HF_HUB_OFFLINE="1")

from tests.ranks import Ranks  # noqa: E402


class ByModule(LoadScopeScheduling):
    """Of xdist: the tests of a module share fixtures, those of tests/cluster the hosts."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.split("::")[0]
        return "cluster" if "/cluster/" in module else module


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByModule:
    return ByModule(config, log)


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
