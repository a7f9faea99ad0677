"""A run that runs away is noticed; one whose schedule raises p, or that learns, is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from selfgen_ds.config import DataConfig, Recipe
from selfgen_ds.methods.runaway import Runaway
from selfgen_ds.train import BetweenSteps


def _told(steps: list[tuple[float, float, float]]) -> list[int]:
    """Return the numbers of the steps after which a runaway is named; a step is p, differing share and loss."""
    watch = Runaway()
    return [number for number, step in enumerate(steps) if watch.update(*step)]


def test_contexts_and_loss_that_get_worse_together_are_named_with_their_figures() -> None:
    watch, told = Runaway(), ""
    for step in range(40):
        grown = max(0, step - 10) / 30
        told = told or watch.update(1.0, 0.06 + 0.64 * grown, 0.5 + 1.6 * grown)
    assert told.startswith("the run runs away: ")
    assert "of the drawn tokens differ from the reference, after 6%, and the loss is" in told
    assert told.endswith("after 0.5")


def test_a_run_that_learns_is_not_named() -> None:
    assert not _told([(0.5, 0.9 - 0.8 * step / 200, 4.0 - 3.5 * step / 200) for step in range(200)])


def test_noise_between_steps_is_not_named() -> None:
    assert not _told([(0.5, 0.3 + 0.1 * (step % 3), 1.0 + 0.3 * (step % 2)) for step in range(200)])


def test_a_schedule_that_raises_p_is_not_named() -> None:
    """Twice the p gives twice the differing tokens and a higher loss."""
    steps = [(0.01 + 0.5 * step / 200, 0.1 + 0.5 * step / 200, 1.0 + step / 200) for step in range(200)]
    assert not _told(steps)


def test_a_flat_p_after_a_schedule_is_watched() -> None:
    rising = [(0.01 + 0.5 * step / 50, 0.1, 1.0) for step in range(50)]
    flat = [(0.51, 0.1 + 0.6 * step / 50, 1.0 + step / 50) for step in range(50)]
    assert _told([*rising, *flat])


def test_steps_that_draw_nothing_are_not_watched() -> None:
    assert not _told([(0.0, float(step > 20), 1.0 + step) for step in range(60)])


def test_the_watch_begins_anew_after_it_has_spoken() -> None:
    once = [(1.0, 0.05, 0.5)] * 15 + [(1.0, 0.6, 2.0)] * 30
    assert len(_told(once)) == 1
    assert len(_told([*once, *[(1.0, 0.95, 4.0)] * 15])) == 2


def test_without_a_cross_entropy_the_differing_tokens_alone_are_watched() -> None:
    watch, told = Runaway(), ""
    for step in range(40):
        told = told or watch.update(1.0, 0.06 + 0.64 * max(0, step - 10) / 30, None)
    assert told.endswith("of the drawn tokens differ from the reference, after 6%")


def _told_of_rounds(rounds: list[tuple[float, float]]) -> list[str]:
    """Return what is told of rounds of two steps each; a round is p and its share of differing tokens."""
    watch = Runaway()
    steps = [(number, *its) for number, its in enumerate(rounds, start=1) for _ in range(2)]
    return [told for step in steps if (told := watch.update_round(*step))]


def test_a_round_that_is_worse_than_the_one_before_is_named_once_with_its_figures() -> None:
    (told,) = _told_of_rounds([(1.0, 0.30), (1.0, 0.54), (1.0, 0.5)])
    expected = "54% of its drawn tokens differ from the reference, after 30%"
    assert told == f"round 2 is worse than the one before: {expected}"
    assert len(_told_of_rounds([(1.0, 0.2), (1.0, 0.3), (1.0, 0.4)])) == 2


def test_rounds_that_get_better_or_that_draw_more_or_nothing_are_not_named() -> None:
    assert not _told_of_rounds([(1.0, 0.5), (1.0, 0.4), (1.0, 0.43)])
    assert not _told_of_rounds([(0.3, 0.1), (0.6, 0.3), (1.0, 0.5)])
    assert not _told_of_rounds([(0.5, 0.1), (0.0, 0.0), (0.5, 0.4)])


def _told_of_lines(*lines: dict[str, float | None]) -> list[str]:
    """Return what the training loop says of lines of `metrics.jsonl`."""
    loop = SimpleNamespace(
        _recipe=Recipe(output_dir="o", deepspeed="d", data=DataConfig(train="t")),
        _runaway=Runaway(),
        _run=SimpleNamespace(total_steps=len(lines)),
    )
    return [told for line in lines if (told := BetweenSteps._runs_away(cast(BetweenSteps, loop), line))]


def _line(number: int, of_round: float | None, drawn: int = 5) -> dict[str, float | None]:
    step = {"drawn_tokens": drawn, "replace_probability": 0.5, "differing_share": 0.1, "loss": 1.0}
    return step | {"round": number, "round_differing_share": of_round}


def test_a_round_is_watched_though_its_first_step_draws_nothing() -> None:
    (told,) = _told_of_lines(_line(1, 0.1), _line(2, 0.9, drawn=0), _line(2, 0.9), _line(3, 0.95))
    assert told.startswith("round 2 is worse")


def test_the_steps_of_a_round_that_was_named_are_not_named_for_the_same_cause() -> None:
    good = [_line(1, 0.1)] * 10
    bad = [_line(2, 0.9) | {"differing_share": 0.9, "loss": 3.0}] * 40
    (told,) = _told_of_lines(*good, *bad)
    assert told.startswith("round 2 is worse")


def test_a_round_whose_share_was_not_recorded_is_not_compared() -> None:
    assert not _told_of_lines(_line(1, None), _line(2, 0.9))
