"""Two hosts, and a Slurm on them; a recipe that runs anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from selfgen_ds.config import to_yaml
from tests.cluster.hosts import Host, hosts, why_not
from tests.cluster.slurm import Slurm
from tests.distributed import runs


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    if reason := why_not():
        pytest.skip(reason)
    with hosts(tmp_path_factory.mktemp("hosts"), 2) as found:
        yield found


@pytest.fixture
def nodes(two_hosts: list[Host]) -> Iterator[list[Host]]:
    """The two hosts, node1 and node2, on which nothing runs."""
    yield two_hosts
    for host in two_hosts:
        host.reset()


@pytest.fixture(scope="session")
def _slurm(two_hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Slurm:
    if reason := why_not(slurm=True):
        pytest.skip(reason)
    return Slurm(two_hosts, tmp_path_factory.mktemp("slurm"))


@pytest.fixture
def slurm(_slurm: Slurm, nodes: list[Host]) -> Iterator[Slurm]:
    """A Slurm whose nodes are the two hosts, without jobs."""
    yield _slurm
    _slurm.cancel_all()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run of four steps of two rows a rank, into `tmp_path / "run"`."""
    runs.write_rows(tmp_path)
    settings = runs.recipe(tmp_path, output_dir=str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(to_yaml(settings))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    """A rank on each host."""
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    return tmp_path / "hostfile"
