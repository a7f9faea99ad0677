"""Settings of every test process, the order of the tests, and the ranks that tests share."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# torch, datasets, and huggingface_hub read these when they are imported; ranks and commands that tests start inherit
# them. Two test processes with a pool of threads each would fight for two cores, over tensors too small to share.
_cache = tempfile.TemporaryDirectory(prefix="selfgen-ds-tests-")
os.environ.update(HF_DATASETS_CACHE=_cache.name, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

from tests.ranks import Ranks  # noqa: E402

gc.disable()  # until the end of the collection: what imports make stays


class OnePairOfRanks(LoadScopeScheduling):
    """Share the unit tests out, a module at a time; then let one xdist worker run all tests that start ranks.

    A pair of ranks keeps two cores busy, and waits at every collective until both ranks have had a core: on two cores
    with six other busy processes, a step of the small runs here took two ranks 4 s, and one rank 1 s. Two pairs would
    slow each other down, and exceed time limits (heartbeats, stops, locks) by chance. The tests of a module share
    fixtures, as do those of tests/cluster, and stay together.
    """

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.split("::")[0] if nodeid.startswith("tests/unit/") else "ranks"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OnePairOfRanks:
    config.option.loadscopereorder = False  # keep the order of pytest_collection_modifyitems
    return OnePairOfRanks(config, log)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put unit tests first, mark them `check` unless they are marked `test` or `slow`, and mark tests/cluster `slow`.

    `make check` begins with the ranks instead, so that the other process runs unit tests beside them and no core waits:
    none of its few distributed tests depends on time. Every test's tier is recorded for `tests/costs.py`.
    """
    ranks_first = config.option.markexpr == "check"
    items.sort(key=lambda item: item.nodeid.startswith("tests/unit/") == ranks_first)
    for item in items:
        if item.nodeid.startswith("tests/cluster/"):
            item.add_marker("slow")
        slow, test = (item.get_closest_marker(name) is not None for name in ("slow", "test"))
        if item.nodeid.startswith("tests/unit/") and not slow and not test:
            item.add_marker("check")
        tier = "slow" if slow else "check" if item.get_closest_marker("check") else "test"
        item.user_properties.append(("tier", tier))


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later garbage collection, which would take 0.4 s with it."""
    gc.freeze()
    gc.enable()


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
