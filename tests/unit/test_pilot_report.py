"""What the report of a pilot says besides the verdicts."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from selfgen_ds.comparison.run_scores import RunScores
from selfgen_ds.comparison.runs import Group
from selfgen_ds.evaluation.curves import Curves
from selfgen_ds.pilot.report import notes, plot


def _group(method: str, unfinished: int | None) -> Group:
    """Return a group of two runs of 20 rows, of whose greedy answers so many were cut."""
    scores = RunScores(
        sample_ids=np.arange(20),
        prompts=np.arange(20),
        references="",
        statistics={},
        curves=Curves(),
        examples=[],
    )
    return Group(
        name=method,
        method=method,
        seeds=[0, 1],
        recipe=None,
        settings={},
        dtype="",
        judged=[],
        runs=[scores, scores],
        cost=None,
        unfinished=unfinished,
    )


def _cost(**shares: float) -> dict[str, Any]:
    return {"runs": {method: {"relative_flops": share} for method, share in shares.items()}}


def test_answers_that_were_cut_are_told_of() -> None:
    groups = [_group("sft", 3), _group("bash", 36), _group("rac", None)]
    (told,) = notes(groups, _cost(sft=1.0, bash=0.95))
    assert told.startswith("bash: 36 of 40 greedy answers were cut before the model ended them. A model that cannot")


def test_a_budget_that_was_not_used_up_is_told_of() -> None:
    (told,) = notes([_group("sft", 0)], _cost(sft=1.0, bash=0.78))
    assert told.startswith("bash: its runs took 0.78 of the operations of sft; with one step or round more")


def _verdict(metric: str, low: float, value: float, high: float) -> dict[str, Any]:
    return {
        "method": "bash",
        "metric": metric,
        "verdict": "helps",
        "low": low,
        "difference": value,
        "high": high,
    }


@pytest.mark.parametrize("losses", [False, True])
def test_the_figure_draws_shares_of_scales_and_turns_losses_round_on_an_axis_of_their_own(losses: bool) -> None:
    rows = [_verdict("chrf", 10.0, 20.0, 40.0), _verdict("exact_match", -0.1, 0.1, 0.3)]
    rows += [_verdict("loss", -3.0, -2.0, -1.0)] * losses
    figure, axes = plt.subplots()
    plot(axes, rows)
    _, other = figure.axes
    drawn = [[[float(x) for x in np.asarray(line.get_xdata())] for line in each.lines] for each in (axes, other)]
    drawn = [[xs for xs in lines if len(xs) == 2 and xs != [0, 0]] for lines in drawn]
    assert sorted(drawn[0]) == [pytest.approx([-0.1, 0.3]), pytest.approx([0.1, 0.4])]
    assert drawn[1] == ([[1.0, 3.0]] if losses else [])
    assert ("losses" in other.get_xlabel()) == losses
    assert axes.get_xlim()[0] == -axes.get_xlim()[1]
    plt.close(figure)
