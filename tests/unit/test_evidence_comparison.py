"""Differences between the arms of a study: paired by seed, with the interval of Student's t, and corrected by arm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments.evidence_comparison import arms_of, differences


def _lines(metric: str, **arms: list[float]) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "seed": seed, "metrics": {metric: value}}
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]


def test_a_difference_has_the_interval_and_p_of_the_paired_t_test() -> None:
    sft, bash = [0.1, 0.4, 0.7, 0.2], [0.35, 0.6, 0.98, 0.41]
    (one,) = differences(_lines("exact_match", sft=sft, bash=bash)).values()
    wanted = stats.ttest_rel(bash, sft)
    interval = wanted.confidence_interval(0.95)
    assert (one.value, one.low, one.high, one.p) == pytest.approx((0.235, interval.low, interval.high, wanted.pvalue))
    assert one.verdict == "better"


@pytest.mark.parametrize(("metric", "verdict"), [("exact_match", "worse"), ("loss", "better"), ("bleu", "worse")])
def test_a_verdict_knows_which_values_of_a_metric_are_better(metric: str, verdict: str) -> None:
    (one,) = differences(_lines(metric, sft=[0.5, 0.6, 0.7], bash=[0.1, 0.21, 0.3])).values()
    assert one.verdict == verdict


def test_p_is_corrected_for_the_metrics_of_the_arm_that_differ_on_some_seed() -> None:
    sft, bash = [0.1, 0.4, 0.7, 0.2], [0.35, 0.6, 0.98, 0.41]
    lines = _lines("exact_match", sft=sft, bash=bash, rac=[0.3, 0.5, 0.6, 0.1])
    for line in lines:
        line["metrics"]["loss"] = line["metrics"]["exact_match"] + 0.01 * line["seed"] * (line["arm"] == "bash")
        line["metrics"]["rouge_l"] = 0.25
    found = differences(lines)
    assert found["bash", "rouge_l"].value == 0
    assert not found["bash", "rouge_l"].verdict
    single = stats.ttest_rel(bash, sft).pvalue
    assert found["bash", "exact_match"].p == pytest.approx(2 * min(single, found["bash", "loss"].p / 2), rel=0.5)
    assert found["bash", "exact_match"].p >= single


def test_seeds_are_paired_and_those_of_one_side_alone_are_left_out() -> None:
    lines = _lines("exact_match", sft=[0.0, 1.0, 0.0], bash=[0.5, 1.0, 0.5, 0.9])
    (one,) = differences(lines).values()
    assert one.value == pytest.approx(1 / 3)


def test_two_seeds_have_an_interval_and_no_verdict_and_one_seed_has_neither() -> None:
    (two,) = differences(_lines("exact_match", sft=[0.1, 0.2], bash=[0.6, 0.7])).values()
    assert two.low < 0.5 < two.high
    assert not two.verdict
    (one,) = differences(_lines("exact_match", sft=[0.1], bash=[0.6])).values()
    assert (one.value, one.verdict) == (0.5, "")
    assert math.isnan(one.low)


def test_seeds_that_agree_by_chance_are_taken_to_differ_by_what_is_shown() -> None:
    (small,) = differences(_lines("exact_match", sft=[0.0, 0.0, 0.0], bash=[0.0005, 0.0005, 0.0005])).values()
    (large,) = differences(_lines("exact_match", sft=[0.0, 0.0, 0.0], bash=[1.0, 1.0, 1.0])).values()
    assert not small.verdict
    assert large.verdict == "better"
    assert large.high - large.value == pytest.approx(stats.t.ppf(0.975, 2) * 0.001 / np.sqrt(3))


def test_arms_have_the_order_of_the_plan_and_its_other_arms_come_last() -> None:
    lines = _lines("loss", rac=[1.0], **{"sft-best": [1.0]}, bash=[1.0], sft=[1.0])
    assert arms_of(lines) == ["sft", "bash", "rac", "sft-best"]


def test_without_the_baseline_there_are_no_differences() -> None:
    assert differences(_lines("loss", bash=[1.0, 2.0])) == {}
