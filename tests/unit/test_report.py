"""The figures of `bench.json`: ratios, rates, the peak of an accelerator, the commit."""

from __future__ import annotations

import subprocess

import pytest
import torch

from selfgen_ds.scaling import environment, statistics
from tests.ranks import ROOT


def test_the_step_time_ratio_is_the_median_over_turns_of_ratios_in_the_same_turn() -> None:
    # in the second turn other load slows both
    sft = [[0.0, 1.0, 2.0, 1.0, 0.0, 4.0], [0.0, 3.0, 6.0, 3.0, 0.0, 12.0], [0.0, 1.0, 2.0, 1.0, 0.0, 4.0]]
    times = [[1.0, 1.0, 2.0, 1.0, 0.0, 5.0], [3.0, 3.0, 6.0, 3.0, 0.0, 15.0], [3.0, 1.0, 2.0, 1.0, 1.0, 8.0]]
    row = statistics.step_times(times, sft)
    assert row["step_time_ratio"] == 1.25
    assert row["step_time_ratio_quartiles"] == [1.25, 1.625]
    assert (row["step_time_s"], row["step_time_s_quartiles"]) == (8.0, [6.5, 11.5])
    assert row["phases_s"]["pass"] == [2.0, 3.0, 3.0]
    assert row["phases_ratio"] == pytest.approx(
        {"pass": 0.75, "forward": 0.25, "backward": 0.5, "optimizer": 0.25, "other": 0.0}
    )


def test_the_ratios_of_sft_to_itself_are_1() -> None:
    sft = [[0.0, 1.0, 2.0, 1.0, 0.5, 4.5], [0.0, 3.0, 6.0, 3.0, 0.0, 12.0]]
    row = statistics.step_times(sft, sft)
    assert (row["step_time_ratio"], row["step_time_ratio_quartiles"]) == (1.0, [1.0, 1.0])
    assert sum(row["phases_ratio"].values()) == pytest.approx(1.0)


def test_memory_and_collectives_are_ratios_to_sft_and_gathers_count_copies_of_the_parameters() -> None:
    sft = {
        "peak_memory_bytes": 200,
        "gathered_bytes": 1800,
        "collectives": {"all_gather": {"calls": 4, "bytes": 900}, "barrier": {"calls": 1, "bytes": 0}},
    }
    mixture = {
        "peak_memory_bytes": 210,
        "gathered_bytes": 2800,
        "collectives": {
            "all_gather": {"calls": 6, "bytes": 1400},
            "barrier": {"calls": 2, "bytes": 0},
            "broadcast": {"calls": 1, "bytes": 5},
        },
    }
    assert statistics.memory_and_collectives(mixture, sft, parameter_bytes=1000) == {
        "peak_memory_ratio": 1.05,
        "gathers": 2.8,
        "extra_gathers": 1.0,
        "collectives_ratio": {"all_gather": {"calls": 1.5, "bytes": 1400 / 900}, "barrier": {"calls": 2.0}},
    }


def test_tokens_per_second_are_of_all_ranks_and_the_mfu_is_of_one_accelerator() -> None:
    times = [[0.0, 0.0, 0.0, 0.0, 0.0, seconds] for seconds in (1.0, 2.0, 9.0)]
    fast = statistics.rates(times, tokens=1000, parameters=50, world_size=4, peak_flops=75_000.0)
    assert fast["tokens_per_second"] == 500.0
    assert fast["mfu"] == 6 * 50 * 1000 / 4 / 2.0 / 75_000.0
    assert statistics.rates(times, tokens=1000, parameters=50, world_size=4, peak_flops=None)["mfu"] is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_an_accelerators_peak_is_known_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(environment.get_accelerator(), "device_name", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert environment.peak_flops() == peak
    monkeypatch.undo()
    assert environment.peak_flops() is None


def test_the_commit_is_that_of_the_checkout_and_says_whether_files_differ() -> None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    changed = git("status", "--porcelain", "--untracked-files=no")
    assert environment.commit() == git("rev-parse", "HEAD") + ("+" if changed else "")
