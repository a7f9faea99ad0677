"""The figures of `compare`: which there are, and the values that they draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from selfgen_ds.comparison.costs import Cost
from selfgen_ds.comparison.plots import Figure, figures
from selfgen_ds.comparison.run_scores import read_scores
from selfgen_ds.comparison.runs import Group
from selfgen_ds.comparison.verdicts import compared
from selfgen_ds.evaluation import predictions
from selfgen_ds.evaluation.metrics import CALIBRATION_BINS, SampleScore

ROWS = 40
MEANS = {
    "loss": 1.5,
    "exact_match": 0.5,
    "recovery_1": 0.25,
    "sampled_2_exact_match": 0.2,
    "sampled_1.5_exact_match": 0.3,
    "sampled_2_after_slip_4": 0.6,
    "noise_0.1_exact_match": 0.4,
    "int4_exact_match": 0.1,
}


def _score(number: int, scale: float) -> SampleScore:
    counts = np.zeros((CALIBRATION_BINS, 3))
    counts[7] = [2.0, 1.0, 1.5 * scale]
    return SampleScore(
        sample_id=number,
        prompt="",
        reference="",
        answer="",
        teacher_forced=[True, True],
        free_running=[True, False],
        log_likelihoods=[-1.0, -2.0],
        own_log_likelihoods=[-1.0, -3.0],
        statistics={name: [mean * scale, 1.0] for name, mean in MEANS.items()}
        | {"calibration_error": counts.ravel().tolist()},
        recovery=[[False, True]],
        divergences=[[1.0, 3.0], [1.0, 1.0]],
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Axes]:
    """Return the axes of every figure of two groups, the second of two seeds and half of the first one's values."""
    groups = []
    for name, seeds, scale in (("a", [0], 1.0), ("b", [0, 1], 0.5)):
        path = tmp_path_factory.mktemp(name) / "predictions.jsonl"
        predictions.write(path, [_score(number, scale) for number in range(ROWS)])
        groups.append(_group(name, seeds, path))
    rows = compared(groups, groups[0].metrics)
    return {figure.title: _drawn(figure) for figure in figures(groups, rows)}


def _group(name: str, seeds: list[int], path: Path) -> Group:
    recipe: dict[str, Any] = {"selfgen": {"method": name}}
    return Group(
        name=name,
        method=name,
        seeds=seeds,
        recipe=recipe,
        settings={},
        dtype="float32",
        judged=[{}] * len(seeds),
        runs=[read_scores(path) for _ in seeds],
        cost=Cost(steps=1, tokens=1, no_grad_tokens=0, flops=1e9 * len(seeds), seconds=1),
        unfinished=0,
    )


def _drawn(figure: Figure) -> Axes:
    _, axes = plt.subplots()
    figure.draw(axes)
    plt.close(axes.figure)
    return axes


def _of_bars(axes: Axes) -> list[list[float]]:
    """Return the values of the points with intervals, per group."""
    return [np.asarray(points.get_ydata()).tolist() for points in _points(axes)]


def _places(axes: Axes) -> list[float]:
    return np.asarray(_points(axes)[0].get_xdata()).tolist()


def _points(axes: Axes) -> list[Any]:
    return [bar.lines[0] for bar in axes.containers if isinstance(bar, ErrorbarContainer)]


def test_there_is_a_figure_for_everything_that_was_measured(drawn: dict[str, Axes]) -> None:
    assert list(drawn) == [
        *("Greedy answers", "The gap by position", "The gap in log-likelihood", "Recovery", "Excess error"),
        *("After own slips", "The price of sampling", "The price of errors in the weights", "Calibration"),
        "Score against compute",
    ]


def test_sampled_answers_stand_at_their_temperatures_and_greedy_ones_at_0(drawn: dict[str, Axes]) -> None:
    axes = drawn["The price of sampling"]
    assert _places(axes) == [0.0, 1.5, 2.0]
    assert _of_bars(axes) == [pytest.approx([0.5, 0.3, 0.2]), pytest.approx([0.25, 0.15, 0.1])]
    slips = drawn["After own slips"]
    assert (_places(slips), _of_bars(slips)) == ([2.0], [pytest.approx([0.6]), pytest.approx([0.3])])


def test_changed_weights_stand_beside_the_weights_as_they_are(drawn: dict[str, Axes]) -> None:
    axes = drawn["The price of errors in the weights"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["none", "noise 0.1", "int4"]
    assert _of_bars(axes) == [pytest.approx([0.5, 0.4, 0.1]), pytest.approx([0.25, 0.2, 0.05])]


def test_curves_are_those_of_all_runs_of_a_group(drawn: dict[str, Axes]) -> None:
    free, forced, *_ = (np.asarray(line.get_ydata()).tolist() for line in drawn["The gap by position"].lines)
    assert (free, forced) == ([1.0, 0.0], [1.0, 1.0])
    free, forced, *_ = (np.asarray(line.get_ydata()).tolist() for line in drawn["The gap in log-likelihood"].lines)
    assert (free, forced) == ([-1.0, -3.0], [-1.0, -2.0])
    assert np.asarray(drawn["Recovery"].lines[0].get_ydata()).tolist() == [0.0, 1.0]
    assert np.asarray(drawn["Excess error"].lines[0].get_ydata()).tolist() == [0.0, 100.0]


def test_calibration_is_the_share_of_right_tokens_by_their_probability(drawn: dict[str, Axes]) -> None:
    _, first, second = drawn["Calibration"].lines
    assert np.asarray(first.get_xydata()).tolist() == [[0.5, 0.75]]
    assert np.asarray(second.get_xydata()).tolist() == [[0.5, 0.375]]


def test_the_score_stands_at_the_operations_of_the_group(drawn: dict[str, Axes]) -> None:
    points = [one.get_xydata().tolist() for one in _points(drawn["Score against compute"])]
    assert points == [[[1e9, 0.5]], [[2e9, 0.25]]]
