import math
from typing import Any

import pytest

from selfgen_ds.config import SelfgenConfig
from selfgen_ds.methods.schedule import replace_probability

TOTAL, SHARE, PEAK = 1000, 0.5, 0.4
RAMP = SHARE * TOTAL
GROWING = ["linear", "exponential", "inverse_sigmoid"]
ALL = ["constant", *GROWING]


def _p(schedule: Any, step: int, total: int = TOTAL, peak: float = PEAK) -> float:
    config = SelfgenConfig(schedule=schedule, replace_probability=peak, schedule_share=SHARE)
    return replace_probability(config, step, total)


STEPS = range(TOTAL)


def test_constant_is_the_peak() -> None:
    assert {_p("constant", step) for step in STEPS} == {PEAK}


def test_linear_is_bengios_straight_line() -> None:
    k, c = 1, 1 / RAMP
    expected = [PEAK * (1 - max(0, k - c * step)) for step in STEPS]
    assert [_p("linear", step) for step in STEPS] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_exponential_is_bengios_power() -> None:
    k = 0.01 ** (1 / RAMP)
    expected = [PEAK * (1 - k**step) for step in STEPS]
    assert [_p("exponential", step) for step in STEPS] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_inverse_sigmoid_is_bengios_with_steps_counted_in_units_of_12_k() -> None:
    k = math.exp(6)
    expected = [PEAK * (1 - k / (k + math.exp(12 * step / RAMP))) for step in STEPS]
    assert [_p("inverse_sigmoid", step) for step in STEPS] == pytest.approx(expected, rel=1e-9)


def test_inverse_sigmoid_is_half_of_the_peak_half_way() -> None:
    assert _p("inverse_sigmoid", round(RAMP / 2)) == pytest.approx(PEAK / 2)


@pytest.mark.parametrize("schedule", ALL)
def test_p_never_falls(schedule: str) -> None:
    values = [_p(schedule, step) for step in range(TOTAL)]
    assert values == sorted(values)


@pytest.mark.parametrize("schedule", GROWING)
def test_a_growing_schedule_starts_at_one_percent_of_the_peak_or_less(schedule: str) -> None:
    assert 0 <= _p(schedule, 0) <= 0.01 * PEAK


@pytest.mark.parametrize("schedule", ALL)
def test_p_is_nearly_the_peak_when_the_share_is_over(schedule: str) -> None:
    assert _p(schedule, round(RAMP)) >= 0.99 * PEAK * (1 - 1e-12)


@pytest.mark.parametrize("schedule", GROWING)
def test_a_growing_schedule_is_not_at_its_peak_before_the_share_is_over(schedule: str) -> None:
    assert _p(schedule, round(0.4 * RAMP)) < 0.9 * PEAK


@pytest.mark.parametrize("schedule", ALL)
def test_p_stays_between_0_and_the_peak(schedule: str) -> None:
    assert all(0 <= _p(schedule, step) <= PEAK for step in range(3 * TOTAL))


@pytest.mark.parametrize("schedule", ALL)
def test_nothing_overflows_after_a_billion_steps(schedule: str) -> None:
    assert all(0.99 * PEAK <= _p(schedule, 10**9, total) <= PEAK for total in (1, 1000, 10**9))


@pytest.mark.parametrize("schedule", ALL)
def test_a_peak_of_0_is_never_left(schedule: str) -> None:
    assert all(_p(schedule, step, peak=0.0) == 0.0 for step in range(TOTAL))


def test_the_share_is_of_the_whole_run() -> None:
    config = SelfgenConfig(schedule="linear", replace_probability=1.0, schedule_share=0.25)
    assert replace_probability(config, 100, 800) == 0.5


def test_the_last_share_of_steps_and_of_rounds_has_a_probability_of_its_own() -> None:
    config = SelfgenConfig(replace_probability=0.4, final_share=0.25, final_probability=0.1)
    assert [replace_probability(config, step, 8) for step in range(8)] == [0.4] * 6 + [0.1] * 2
    assert [replace_probability(config, number, 4, number + 1) for number in range(4)] == [0.4] * 3 + [0.1]


@pytest.mark.parametrize(("total", "expected"), [(3, [0.4, 0.4, 0.1]), (1, [0.4])])
def test_a_small_last_share_is_one_round_at_least_unless_there_is_no_other(total: int, expected: list[float]) -> None:
    config = SelfgenConfig(replace_probability=0.4, final_share=0.2, final_probability=0.1)
    assert [replace_probability(config, number, total, number + 1) for number in range(total)] == expected


def test_a_run_may_end_as_sft() -> None:
    config = SelfgenConfig(schedule="linear", final_share=0.5)
    values = [replace_probability(config, step, 10) for step in range(10)]
    assert values[5:] == [0.0] * 5
    assert all(values[1:5])
