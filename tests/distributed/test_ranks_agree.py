"""Checks that ranks have the same input before the first step, and that no other process can join their group."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch.distributed as dist

from selfgen_ds.config import Recipe
from selfgen_ds.engine import extensions
from selfgen_ds.errors import InputError
from selfgen_ds.methods.scheduled_sampling import ScheduledSampling
from selfgen_ds.ranks.agreement import check_ranks, raise_on_all_ranks
from selfgen_ds.rounds import rounds
from selfgen_ds.setup import prepare
from selfgen_ds.train import train
from selfgen_ds.versions import versions
from tests.distributed import runs
from tests.ranks import Ranks


def check(facts: list[dict[str, Any]]) -> str:
    try:
        check_ranks(facts[dist.get_rank()])
    except InputError as error:
        return str(error)
    return ""


def test_each_difference_between_ranks_is_a_line_with_rank_and_host(two_ranks: Ranks) -> None:
    host = socket.gethostname()
    expected = [
        f"seed: 2 on rank 1 on {host}, 1 on rank 0 on {host}",
        f"torch: None on rank 1 on {host}, '2' on rank 0 on {host}",
    ]
    found = two_ranks.run(check, [{"seed": 1, "torch": "2"}, {"seed": 2}])
    assert [sorted(lines.splitlines()) for lines in found] == [expected, expected]


def bad_input_of(problems: list[str | None], hosts: list[str]) -> None:
    with patch("socket.gethostname", return_value=hosts[dist.get_rank()]), raise_on_all_ranks():
        if (problem := problems[dist.get_rank()]) is not None:
            raise InputError(problem)


@pytest.mark.parametrize(
    ("problems", "hosts", "line"),
    [
        ([None, "no such file"], ["a", "b"], r"no such file \(rank 1 on b\)"),
        ([None, "no such file"], ["a", "a"], "no such file"),
        (["no such file", "no such file"], ["a", "b"], "no such file"),
    ],
)
def test_bad_input_that_not_all_ranks_have_names_rank_and_host_if_there_are_several(
    two_ranks: Ranks, problems: list[str | None], hosts: list[str], line: str
) -> None:
    with pytest.raises(AssertionError, match=rf"InputError: {line}\n"):
        two_ranks.run(bad_input_of, problems, hosts)


def train_with_another_seed_on_rank_1(settings: Recipe) -> None:
    settings.seed += dist.get_rank()
    train(settings, set())


def test_a_rank_with_another_recipe_is_refused_before_anything_is_read(two_ranks: Ranks, folder: Path) -> None:
    settings = runs.recipe(folder)
    with pytest.raises(AssertionError, match="InputError: seed: 4 on rank 1"):
        two_ranks.run(train_with_another_seed_on_rank_1, settings)
    assert not Path(settings.output_dir).exists()


def train_with_another_torch_on_rank_1(settings: Recipe) -> None:
    found = versions() | ({"torch": "2.12"} if dist.get_rank() else {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "versions", lambda: found)
        train(settings, set())


def test_a_rank_with_other_versions_is_refused(two_ranks: Ranks, folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"InputError: torch: '2\.12' on rank 1 on \S+, '2\.13\.0"):
        two_ranks.run(train_with_another_torch_on_rank_1, runs.recipe(folder))


def train_with_a_round_that_rank_1_cannot_read(settings: Recipe) -> None:
    def unreadable(path: Path) -> None:
        raise InputError(f"{path}: cannot be read")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank():
            patch.setattr(rounds, "load_table", unreadable)
        train(settings, set())


def test_a_round_that_one_rank_cannot_read_ends_all(two_ranks: Ranks, folder: Path) -> None:
    settings = runs.recipe(folder, selfgen=replace(runs.MIXING, method="bash"))
    with pytest.raises(AssertionError, match=r"(?s)rank 0.*round-01: cannot be read.*rank 1.*round-01: cannot be read"):
        two_ranks.run(train_with_a_round_that_rank_1_cannot_read, settings)


class OneForwardMore(ScheduledSampling):
    """A method with one more forward on rank 1, in the third step."""

    def contexts(self, batches: Any, policy: Any, step: int) -> Any:
        if step == 2 and dist.get_rank() == 1:
            policy.predict(batches[0])
        return super().contexts(batches, policy, step)


def test_a_rank_that_makes_another_number_of_forwards_is_named(two_ranks: Ranks, folder: Path) -> None:
    # weights that ZeRO-3 never releases: no gather would make the ranks wait for each other
    method = replace(runs.MIXING, method=f"{__name__}:OneForwardMore")
    settings = runs.recipe(folder, deepspeed=runs.write_whole_json(folder), selfgen=method)
    with pytest.raises(AssertionError, match=r"rank 1 made (\d) forwards in a step, rank 0 made \d"):
        two_ranks.run(runs.run_training, settings)


def listening() -> list[str]:
    """Return the addresses on which this rank listens."""
    connections = psutil.Process().net_connections(kind="inet")
    return [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]


def test_no_rank_listens_on_all_interfaces(two_ranks: Ranks) -> None:
    for addresses in two_ranks.run(listening):
        assert addresses, "gloo and the store of rank 0 listen somewhere"
        assert set(addresses).isdisjoint({"0.0.0.0", "::"})
    assert "127.0.0.1" in two_ranks.run(listening)[0]


def clear(root: str) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = root
    try:
        extensions.clear_stale_locks()
    finally:
        del os.environ["TORCH_EXTENSIONS_DIR"]


def test_a_lock_that_a_killed_build_left_is_removed_and_one_in_use_is_not(two_ranks: Ranks, tmp_path: Path) -> None:
    stale, held = tmp_path / "py311_cpu" / "cpu_adam" / "lock", tmp_path / "async_io" / "lock"
    for lock in (stale, held):
        lock.parent.mkdir(parents=True)
        lock.touch()
    with open(held):
        two_ranks.run(clear, str(tmp_path))
    assert (stale.exists(), held.exists()) == (False, True)
    two_ranks.run(clear, str(tmp_path))
    assert not held.exists()
