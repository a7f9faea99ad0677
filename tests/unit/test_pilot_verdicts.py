"""The verdicts of a pilot: what helps, what harms, and what it would take to tell."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from selfgen_ds.comparison.intervals import (
    Estimate,
    Sample,
    difference,
    rows_and_seeds_needed,
    rows_needed,
    seeds_needed,
)
from selfgen_ds.comparison.run_scores import RunScores
from selfgen_ds.comparison.runs import Group
from selfgen_ds.evaluation.curves import Curves
from selfgen_ds.pilot.report import needed, sentences
from selfgen_ds.pilot.verdicts import chosen_metrics, verdicts, verdicts_by_kind

ROWS, SEEDS = 200, 3


def _group(method: str, metrics: dict[str, np.ndarray]) -> Group:
    """Return a group of runs with the values `[seeds, rows]` of some metrics."""
    runs = [
        RunScores(
            sample_ids=np.arange(ROWS),
            prompts=np.arange(ROWS),
            references="",
            statistics={name: np.stack([v[seed], np.ones(ROWS)], axis=1) for name, v in metrics.items()},
            curves=Curves(),
            examples=[],
        )
        for seed in range(SEEDS)
    ]
    return Group(
        name=f"runs/{method}",
        method=method,
        seeds=list(range(SEEDS)),
        recipe={"selfgen": {"method": method}},
        settings={},
        dtype="",
        judged=[],
        runs=runs,
        cost=None,
        unfinished=0,
    )


def _right(share: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((SEEDS, ROWS)) < share).astype(float)


def _two(**shares: tuple[float, float]) -> list[Group]:
    """Return sft and a method with shares of right rows, by metric."""
    return [
        _group(
            method,
            {name: _right(pair[place], 10 * number + place) for number, (name, pair) in enumerate(shares.items())},
        )
        for place, method in enumerate(("sft", "bash"))
    ]


def _words(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["metric"]: row["verdict"] for row in rows}


def test_a_method_helps_harms_or_shows_no_difference_by_each_metrics_better_side() -> None:
    groups = _two(exact_match=(0.3, 0.7), loss=(0.3, 0.7), rouge_l=(0.5, 0.5))
    rows = verdicts(groups, ["exact_match", "loss", "rouge_l"])
    assert _words(rows) == {"exact_match": "helps", "loss": "harms", "rouge_l": "no difference shown"}
    assert [row["method"] for row in rows] == ["bash"] * 3
    assert all(row["low"] <= row["difference"] <= row["high"] for row in rows)
    told = "helps in exact_match; harms in loss; no difference shown in rouge_l."
    assert sentences(rows, {"bash": {"selfgen.method": "bash"}}) == [f"bash: {told}"]
    settings = {"selfgen.method": "bash", "selfgen.passes": 2, "optim.loss": "dft"}
    assert sentences(rows, {"bash": settings}) == [f"bash (passes 2, optim.loss dft): {told}"]


def test_of_a_single_seed_nothing_is_shown() -> None:
    sft, bash = (replace(group, seeds=[0], runs=group.runs[:1]) for group in _two(exact_match=(0.1, 0.9)))
    (row,) = verdicts([sft, bash], ["exact_match"])
    assert row["p"] < 1e-6
    assert row["verdict"] == "no difference shown"
    assert (row["rows_needed"], row["seeds_needed"]) == (None, None)


def test_a_correction_is_compared_with_the_answer_of_sft() -> None:
    sft, other = _two(exact_match=(0.3, 0.3), corrected_1_exact_match=(0.9, 0.7))
    assert verdicts([sft, other], ["corrected_1_exact_match"]) == [], "bash does not learn to correct itself"
    rac = replace(other, method="rac", recipe={"selfgen": {"method": "rac"}})
    (row,) = verdicts([sft, rac], ["corrected_1_exact_match"])
    assert row["verdict"] == "helps"
    assert row["baseline"] == pytest.approx(sft.sample("exact_match").values.mean())


def test_a_difference_of_nothing_is_called_so() -> None:
    group = _two(exact_match=(0.5, 0.5))[0]
    (row,) = verdicts([group, replace(group, method="bash")], ["exact_match"])
    assert (row["verdict"], needed(row)) == ("no difference shown", "there is none")


def test_a_metric_that_is_not_finite_shows_nothing() -> None:
    groups = _two(loss=(0.3, 0.7))
    groups[1].runs[0].statistics["loss"][:] = np.nan
    (row,) = verdicts(groups, ["loss"])
    assert row["verdict"] == "no difference shown"
    assert (row["rows_needed"], row["seeds_needed"]) == (None, None)


def test_the_rows_needed_are_all_of_which_the_metric_counts_a_part() -> None:
    rng = np.random.default_rng(0)
    values = np.array([0.1, 0.101, 0.099])[:, None] + 0.6 * rng.standard_normal((1, 100))
    found = _to_nothing(values - values.mean() + 0.1)
    all_count, a_quarter_counts = rows_needed(found, 100, 0.05), rows_needed(found, 400, 0.05)
    assert all_count is not None
    assert a_quarter_counts is not None
    assert all_count > 100
    assert a_quarter_counts == pytest.approx(4 * all_count, rel=0.1), "both have two digits"


def test_p_is_corrected_for_the_number_of_verdicts() -> None:
    groups = _two(exact_match=(0.40, 0.55), rouge_l=(0.5, 0.5), loss=(0.5, 0.5), last_token=(0.5, 0.5))
    alone, among = verdicts(groups, ["exact_match"]), verdicts(groups, ["exact_match", "rouge_l", "loss", "last_token"])
    assert among[0]["p"] == alone[0]["p"] == alone[0]["p_corrected"]
    assert among[0]["p_corrected"] == pytest.approx(4 * alone[0]["p"])


def test_each_kind_of_rows_with_enough_rows_has_its_own_verdict() -> None:
    kinds = ["easy"] * 100 + ["hard"] * 95 + ["rare"] * 5
    sft, bash = _two(exact_match=(0.5, 0.5))
    hard = _right(0.9, 7)
    for seed, run in enumerate(bash.runs):
        run.statistics["exact_match"][100:, 0] = hard[seed, 100:]
    rows = verdicts_by_kind([sft, bash], ["exact_match"], kinds)
    assert {row["kind"]: row["verdict"] for row in rows} == {"easy": "no difference shown", "hard": "helps"}
    assert [row["rows"] for row in rows] == [100, 95]


def test_the_metrics_of_the_verdicts_are_few_and_say_something() -> None:
    zeros = (0.0, 0.0)
    groups = _two(
        exact_match=zeros,
        rouge_l=(0.5, 0.5),
        bleu=(0.5, 0.5),
        sampled_1_rouge_l=(0.4, 0.4),
        loss=(1, 1),
        entropy=(1, 1),
    )
    assert chosen_metrics(groups) == ["rouge_l", "sampled_1_rouge_l", "loss"]
    groups = _two(final_answer=(0.5, 0.5), exact_match=(0.1, 0.1), rouge_l=(0.5, 0.5), recovery_4=(1, 1))
    assert chosen_metrics(groups) == ["final_answer", "rouge_l", "recovery_4"]


def _to_nothing(values: np.ndarray) -> Estimate:
    """Return the difference of values `[seeds, rows]` to zeros."""

    def sample(numbers: np.ndarray) -> Sample:
        statistics = np.stack([numbers, np.ones_like(numbers)], axis=2)
        return Sample(statistics=statistics, of_sums=lambda sums: sums[..., 0] / sums[..., 1])

    return difference(sample(values), sample(0 * values), same_seeds=True)


def test_the_rows_needed_show_the_difference_and_fewer_do_not() -> None:
    rng = np.random.default_rng(0)
    means = np.array([0.05, 0.051, 0.049])[:, None]  # the seeds agree, so that rows are what is missing

    def found(rows: int) -> Estimate:
        values = means + 0.6 * rng.standard_normal((1, rows))
        values += 0.05 - values.mean()
        return _to_nothing(values)

    few = found(200)
    assert few.p > 0.05
    needed = rows_needed(few, 200, 0.05)
    assert needed is not None
    assert found(round(1.3 * needed)).p < 0.05 < found(round(0.6 * needed)).p


def test_rows_lower_what_each_seed_gets_wrong_by_itself_too() -> None:
    """The means of the seeds differ as much as 100 rows of deviation 1 let them (by 0.9 of the variance)."""
    values = np.random.default_rng(0).standard_normal((3, 100))
    values += -values.mean(axis=1, keepdims=True) + 0.1 + math.sqrt(0.9 / 100) * np.array([[-1.0], [0.0], [1.0]])
    found = _to_nothing(values)
    needed = rows_needed(found, 100, 0.05)
    # Student's t of two degrees of freedom: 4.303 * sqrt(0.9 / (3 * rows)) is 0.1 at 555 rows
    assert needed is not None
    assert 555 <= needed <= 620, "a factor is at most 1.1 too large"


def test_where_rows_or_seeds_alone_show_nothing_both_do() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1, 100))
    found = _to_nothing(0.05 + 2 * (rows - rows.mean()) + np.array([[-0.05], [0.0], [0.05]]))
    assert (rows_needed(found, 100, 0.05), seeds_needed(found, 3, 0.05)) == (None, None)
    both = rows_and_seeds_needed(found, 100, 3, 0.05)
    assert both is not None
    assert both[0] > 1000
    assert both[1] == 12, "2.20 * 0.05 / sqrt(12) is below 0.05, and 2.57 * 0.05 / sqrt(6) is not"


def test_seeds_that_differ_too_much_cannot_be_made_up_for_by_rows() -> None:
    found = _to_nothing(np.stack([np.full(100, value) for value in (0.3, -0.1, 0.1)]))
    assert rows_needed(found, 100, 0.05) is None
    # Student's t of a mean of 0.1 with a deviation of 0.2: 2.11 * 0.2 / sqrt(18) is below 0.1, and that of 17 is not
    assert seeds_needed(found, 3, 0.05) == 18
