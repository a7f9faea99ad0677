"""Fixtures: two hosts, a Slurm on these hosts, and a recipe for them."""

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
    """Make the hosts node1 and node2."""
    if reason := why_not():
        pytest.skip(reason)
    with hosts(tmp_path_factory.mktemp("hosts"), 2) as found:
        yield found


@pytest.fixture
def nodes(two_hosts: list[Host]) -> Iterator[list[Host]]:
    """Return the hosts node1 and node2, on which only daemons run."""
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
    """Return a Slurm without jobs, whose nodes are the two hosts."""
    yield _slurm
    _slurm.cancel_all()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write the recipe of a run of four steps, with `output_dir` at `tmp_path / "run"`."""
    runs.write_rows(tmp_path)
    settings = runs.recipe(tmp_path, output_dir=str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(to_yaml(settings))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    """Write a hostfile with one rank per host."""
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    return tmp_path / "hostfile"
