"""What a benchmark makes of its times."""

from __future__ import annotations

import pytest

from selfgen_ds.scaling import report


def test_the_step_time_ratio_is_the_median_over_turns_of_ratios_in_the_same_turn() -> None:
    # the machine is busy in the second turn, and hits both
    sft = [[0.0, 1.0, 2.0, 1.0, 0.0, 4.0], [0.0, 3.0, 6.0, 3.0, 0.0, 12.0], [0.0, 1.0, 2.0, 1.0, 0.0, 4.0]]
    times = [[1.0, 1.0, 2.0, 1.0, 0.0, 5.0], [3.0, 3.0, 6.0, 3.0, 0.0, 15.0], [3.0, 1.0, 2.0, 1.0, 1.0, 8.0]]
    row = report.row(times, sft)
    assert row["step_time_ratio"] == 1.25
    assert row["step_time_ratio_quartiles"] == [1.25, 1.625]
    assert row["step_time_s"] == [6.5, 8.0, 11.5]
    assert row["phases_s"]["pass"] == [2.0, 3.0, 3.0]
    assert row["phases_ratio"] == pytest.approx(
        {"pass": 0.75, "forward": 0.25, "backward": 0.5, "optimizer": 0.25, "other": 0.0}
    )


def test_sft_beside_itself_is_1() -> None:
    sft = [[0.0, 1.0, 2.0, 1.0, 0.5, 4.5], [0.0, 3.0, 6.0, 3.0, 0.0, 12.0]]
    row = report.row(sft, sft)
    assert (row["step_time_ratio"], row["step_time_ratio_quartiles"]) == (1.0, [1.0, 1.0])
    assert sum(row["phases_ratio"].values()) == pytest.approx(1.0)
