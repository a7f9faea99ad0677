"""The steps of a method that cost what those of sft cost."""

from __future__ import annotations

from selfgen_ds.pilot.budget import Price, cost_of, price, steps_within

_SFT = {"rows": 64.0, "rows_per_step": 8.0, "steps": 4.0, "step_flops": 400.0, "rounds": 0.0, "round_flops": 0.0}


def test_a_pass_is_paid_in_every_step_and_a_round_by_the_row() -> None:
    assert price(_SFT | {"step_flops": 500.0}, _SFT) == Price(of_row=1.25, of_round=0.0)
    # one step of sft costs 100, that is 12.5 a row; a round of 64 rows that costs 400 costs 6.25 a row
    assert price(_SFT | {"rounds": 1.0, "round_flops": 400.0}, _SFT) == Price(of_row=1.0, of_round=0.5)


def test_a_method_takes_the_most_steps_that_cost_no_more_than_those_of_sft() -> None:
    of_pass = Price(of_row=1.25, of_round=0.0)
    assert steps_within(of_pass, 100, 8, 64) == 80
    assert cost_of(of_pass, 80, 8, 64) == 100 * 8


def test_every_round_is_paid_in_full_even_if_the_run_ends_within_it() -> None:
    of_round = Price(of_row=1.0, of_round=0.5)
    # 8 steps a round; two rounds cost 2 * 64 * 1.5 = 192 rows, which are 24 steps of sft
    assert steps_within(of_round, 24, 8, 64) == 16
    # of 25 steps, the third round alone would cost 4
    assert steps_within(of_round, 25, 8, 64) == 16
    assert steps_within(of_round, 29, 8, 64) == 17
    assert cost_of(of_round, 17, 8, 64) == 17 * 8 + 3 * 32


def test_rounds_that_last_longer_are_drawn_less_often() -> None:
    of_round = Price(of_row=1.0, of_round=0.5)
    assert steps_within(of_round, 24, 8, 64, epochs_per_round=3) == 20


def test_a_round_can_cost_more_than_the_whole_budget() -> None:
    assert steps_within(Price(of_row=1.0, of_round=2.0), 10, 8, 64) == 0
