"""The variables that are set before torch is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfgen_ds.ranks import environment

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_cores", lambda: 8)


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, "8"),
        ({"LOCAL_SIZE": "4"}, "2"),
        ({"LOCAL_WORLD_SIZE": "2"}, "4"),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "16"}, "1"),
        ({"SLURM_CPUS_PER_TASK": "3"}, "3"),
        ({"SLURM_CPUS_PER_TASK": "64"}, "8"),
        ({"LOCAL_SIZE": "4", "OMP_NUM_THREADS": "5"}, "5"),
    ],
)
def test_a_rank_has_its_share_of_the_cores_unless_its_threads_are_given(given: dict[str, str], threads: str) -> None:
    environment.set_defaults(given)
    assert given["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("name", _ALLOCATOR)
def test_an_allocator_that_is_given_is_kept(name: str) -> None:
    given = {name: "max_split_size_mb:128"}
    environment.set_defaults(given)
    assert {key: value for key, value in given.items() if key.startswith("PYTORCH")} == {name: "max_split_size_mb:128"}


def test_cores_are_counted_once_whatever_their_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    cores = environment._cores()
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {10**6, 10**6 + 1})
    assert environment._cores() == 2, "processors of which the system tells nothing count as cores"


def test_the_variables_are_set_before_the_commands_are_loaded() -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", *_ALLOCATOR)}
    code = """
import os, sys, types
sys.argv[1:] = ["train"]
told = lambda: print(os.environ["OMP_NUM_THREADS"], os.environ["PYTORCH_ALLOC_CONF"], "torch" in sys.modules)
sys.modules["selfgen_ds.cli"] = types.SimpleNamespace(main=told)
from selfgen_ds import __main__
__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    threads, allocator, torch_is_loaded = done.stdout.split()
    assert int(threads) >= 1
    assert (allocator, torch_is_loaded) == ("expandable_segments:True", "False")
