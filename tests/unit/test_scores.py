"""Scores: the metrics of one row and of all rows, batches that fit the model, and corrections."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from selfgen_ds.data.correction import Correction
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.evaluation.answers import EvaluationRequests, RowAnswers
from selfgen_ds.evaluation.curves import Curves, accuracy_by_errors
from selfgen_ds.evaluation.metrics import SampleScore, aggregate
from selfgen_ds.evaluation.recovery import ForcedError
from selfgen_ds.evaluation.row_scores import pass_at_k, right_tokens, score_rows
from selfgen_ds.evaluation.scores import _batches, corrected_length, evaluate
from selfgen_ds.evaluation.text_metrics import TextMetrics
from selfgen_ds.model.head import Prediction
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.model.reductions import add_reductions
from tests.batches import sample

PREDICTION = Prediction(
    best=torch.tensor([1, 2, 9, 4]),
    second=torch.tensor([5, 6, 3, 8]),
    log_probability=torch.tensor([-0.5, -0.5, -0.75, -0.25]),
    confidence=torch.tensor([0.9, 0.8, 0.7, 0.6]),
    entropy=torch.tensor([0.1, 0.2, 0.3, 0.4]),
)
REFERENCE = [1, 2, 3, 4]  # the last token ends the answer


class Letters:
    """A tokenizer that decodes 1, 2, ... as `a`, `b`, ..., and leaves out the end token 4."""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(ord("a") + int(i) - 1) for i in ids if i != 4)


def _row(answer: list[int], sample_id: int = 0, **changes: Any) -> RowAnswers:
    row = sample([7], REFERENCE, sample_id)
    values: dict[str, Any] = {
        "sample": row,
        "prediction": PREDICTION,
        "answer": answer,
        "after_own": Prediction(*(values[:3] for values in PREDICTION)),
        "forced": [],
        "sampled": {},
        "continued": {},
        "corrected": [],
        "divergences": [],
    }
    return RowAnswers(**(values | changes))


def _score(answer: list[int], **changes: Any) -> SampleScore:
    (score,) = score_rows([_row(answer, **changes)], Letters(), TextMetrics(), [4])
    return score


def test_a_row_has_the_means_over_its_tokens() -> None:
    score = _score([1, 9, 9, 4])
    metrics = score.metrics()
    assert (score.answer, score.reference, score.unfinished) == ("aii", "abc", False)
    assert metrics["loss"] == pytest.approx(0.5)
    assert metrics["free_running_loss"] == pytest.approx(1.75 / 3)
    assert (metrics["teacher_forced_accuracy"], metrics["free_running_accuracy"]) == (0.75, 0.5)
    assert metrics["entropy"] == pytest.approx(0.25)
    assert metrics["exact_match"] == 0.0
    assert score.log_likelihoods == [-0.5, -0.5, -0.75, -0.25]


def test_the_calibration_error_is_the_weighted_gap_of_confidence_and_accuracy() -> None:
    """All four tokens are in bins of their own, so the error is the mean gap: .1, .2, .7 (wrong) and .4."""
    assert _score(REFERENCE).metrics()["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.7 + 0.4) / 4)


def test_an_answer_without_an_end_token_is_unfinished() -> None:
    assert _score([1, 2, 3]).unfinished
    assert _score([]).unfinished


def test_recovery_counts_the_next_token_the_next_four_and_the_last_before_the_end_token() -> None:
    error = ForcedError(start_ids=[9], rest_ids=[1, 2, 3, 1, 2, 3, 4])
    metrics = _score(REFERENCE, forced=[(error, [1, 9, 3, 1, 9, 3, 9], 3.5)]).metrics()
    assert (metrics["recovery_1"], metrics["recovery_4"], metrics["recovery_last"]) == (1.0, 0.75, 1.0)
    assert metrics["recovery_loss"] == 0.5


def test_sampled_answers_have_metrics_of_their_own() -> None:
    metrics = _score(REFERENCE, sampled={1.5: [[1, 2, 9, 4], REFERENCE]}).metrics()
    assert metrics["sampled_1.5_exact_match"] == 0.5
    assert metrics["sampled_1.5_accuracy"] == 0.875
    assert metrics["sampled_1.5_last_token"] == 0.5
    assert (metrics["sampled_1.5_pass_1"], metrics["sampled_1.5_pass_2"]) == (0.5, 1.0)


@pytest.mark.parametrize(("answers", "right", "k", "expected"), [(4, 0, 2, 0.0), (4, 1, 2, 0.5), (4, 3, 2, 1.0)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(
    answers: int, right: int, k: int, expected: float
) -> None:
    flags = [True] * right + [False] * (answers - right)
    assert expected == np.mean([any(chosen) for chosen in combinations(flags, k)])
    assert pass_at_k(answers, right, k) == pytest.approx(expected)


def test_each_correction_is_scored_against_the_reference_and_the_answer_before_it() -> None:
    texts = [[1, 2, 3, 4], [1, 2, 3, 4], [2, 4], [2, 4], [3, 4]]
    metrics = _score([9, 4], corrected=texts).metrics()
    kinds = ("exact_match", "wrong_to_right", "right_to_wrong", "unchanged")
    assert {kind: [metrics[f"corrected_{k}_{kind}"] for k in range(1, 6)] for kind in kinds} == {
        "exact_match": [1.0, 1.0, 0.0, 0.0, 0.0],
        "wrong_to_right": [1.0, 0.0, 0.0, 0.0, 0.0],
        "right_to_wrong": [0.0, 0.0, 1.0, 0.0, 0.0],
        "unchanged": [0.0, 1.0, 0.0, 1.0, 0.0],
    }


def test_a_continuation_is_compared_with_the_rest_of_the_reference() -> None:
    score = _score(REFERENCE, continued={0.5: (2, [3, 4])})
    assert score.metrics()["prefix_0.5_exact_match"] == 1.0
    assert score.other_answers == {"prefix_0.5": ["c"]}


def test_the_loss_is_a_mean_over_tokens_and_the_other_metrics_are_means_over_rows() -> None:
    short = Prediction(*(values[:1] for values in PREDICTION))._replace(log_probability=torch.tensor([-4.0]))
    one = _row([9], 1, sample=sample([7], [1], 1), prediction=short, after_own=short)
    metrics = aggregate(score_rows([_row(REFERENCE), one], Letters(), TextMetrics(), [4]))
    assert metrics["loss"] == pytest.approx(6.0 / 5)
    assert metrics["teacher_forced_accuracy"] == pytest.approx((0.75 + 1.0) / 2)
    assert metrics["exact_match"] == 0.5


def test_curves_are_means_over_the_rows_that_reach_a_position() -> None:
    short = _row([9], 1, sample=sample([7], [1], 1), prediction=Prediction(*(values[:1] for values in PREDICTION)))
    scores = score_rows([_row([1, 9, 9, 4]), short], Letters(), TextMetrics(), [4])
    found = Curves(scores).to_json()
    assert found["teacher_forced"] == [1.0, 1.0, 0.0, 1.0]
    assert found["free_running"] == [0.5, 0.0, 0.0, 1.0]
    assert found["teacher_forced_log_likelihood"] == [-0.5, -0.5, -0.75, -0.25]


def test_the_accuracy_by_errors_keeps_places_and_shares_of_errors_apart() -> None:
    flags = [[True, True, True, True], [False, True, False, False]]
    whole = replace(_score(REFERENCE), own_log_likelihoods=[0.0] * 4)
    scores = [replace(whole, free_running=row) for row in flags]
    groups = {(g["from_position"], g["most_errors"]): (g["tokens"], g["accuracy"]) for g in accuracy_by_errors(scores)}
    assert groups == {
        (1, 0.0): (2, 0.5),
        (2, 0.0): (1, 1.0),
        (2, 1.0): (1, 1.0),
        (3, 0.0): (1, 1.0),
        (3, 0.5): (1, 0.0),
        (4, 0.0): (1, 1.0),
        (4, 1.0): (1, 0.0),
    }


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([1, 2, 3], [True, True, True]),
        ([1, 9, 3], [True, False, True]),
        ([1], [True, False, False]),
        ([1, 2, 3, 4], [True] * 3),
        ([], [False] * 3),
    ],
)
def test_an_answer_is_right_position_by_position(answer: list[int], expected: list[bool]) -> None:
    assert right_tokens(answer, [1, 2, 3]) == expected


def _uneven(count: int) -> list[TrainingRow]:
    """Return rows with a long prompt and a short answer, and rows with the reverse, in turn.

    Each row fits into 32 positions; the longest prompt and the longest answer together do not.
    """
    return [sample([5] * (4 if i % 2 else 27), [6] * (27 if i % 2 else 4), i) for i in range(count)]


def test_the_longest_prompt_and_the_longest_answer_of_a_batch_fit_the_models_positions() -> None:
    batches = list(_batches(_uneven(10), 2, 2, 32, {}, None))
    for shares in batches:
        samples = [sample for share in shares for sample in share]
        prompt = max(len(sample.prompt_ids) for sample in samples)
        assert prompt + max(len(sample.response_ids) for sample in samples) <= 32
    assert sorted(sample.sample_id for shares in batches for share in shares for sample in share) == list(range(10))


def test_batches_are_full_if_the_model_sets_no_limit() -> None:
    batches = _batches(_uneven(10), 2, 2, None, {}, None)
    assert [[len(share) for share in shares] for shares in batches] == [[2, 2], [2, 2], [1, 1]]


def test_what_the_answer_does_not_reach_is_no_error_in_it() -> None:
    score = replace(_score([1, 4]), own_log_likelihoods=[0.0] * 2, free_running=[True, False, False, False])
    assert [(g["from_position"], g["tokens"]) for g in accuracy_by_errors([score])] == [(1, 1), (2, 1)]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_answer_does_not_depend_on_the_other_rows_of_its_batch(batch_size: int) -> None:
    torch.manual_seed(0)
    model = add_reductions(GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=64, n_embd=16, n_layer=1, n_head=2)))
    policy = EnginePolicy(model.eval(), end_tokens=[BYTES.eos_token_id])
    rows = [sample([5, 6], [7] * 3, 0), sample([8], [9] * 30, 1)]
    scores = evaluate(policy, rows, BYTES, batch_size)
    alone = [evaluate(policy, rows, BYTES, 1)[i].answer for i in range(2)]
    assert [score.answer for score in scores] == alone


def test_one_long_reference_does_not_leave_the_other_rows_alone_in_their_batches() -> None:
    class Counting(EnginePolicy):
        rows: list[int]

        def complete(self, prompts: list[list[int]], *args: object, **options: object) -> list[list[int]]:
            self.rows.append(len(prompts))
            return [[BYTES.eos_token_id] for _ in prompts]

    model = add_reductions(GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=64, n_embd=16, n_layer=1, n_head=2)))
    policy = Counting(model.eval(), end_tokens=[BYTES.eos_token_id])
    policy.rows = []
    rows = [*(sample([5] * 10, [6] * 3, i) for i in range(8)), sample([5] * 4, [6] * 60, 8)]
    evaluate(policy, rows, BYTES, 4)
    assert policy.rows == [4, 4, 1]


def test_a_model_whose_logits_are_not_finite_has_scores_that_say_so() -> None:
    nan = PREDICTION._replace(
        log_probability=torch.full((4,), torch.nan),
        confidence=torch.full((4,), torch.nan),
        entropy=torch.full((4,), torch.nan),
    )
    metrics = _score([1, 4], prediction=nan, after_own=Prediction(*(part[:2] for part in nan))).metrics()
    assert all(np.isnan(metrics[name]) for name in ("loss", "entropy", "calibration_error", "free_running_loss"))


def test_a_model_with_learned_positions_is_evaluated_on_rows_that_just_fit() -> None:
    tokenizer = byte_tokenizer()
    config = GPT2Config(vocab_size=258, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = add_reductions(GPT2LMHeadModel(config).eval())
    policy = EnginePolicy(model, end_tokens=[tokenizer.eos_token_id])
    scores = evaluate(policy, _uneven(6), tokenizer, batch_size=6)
    assert [len(score.free_running) for score in scores] == [4, 27] * 3


class Scripted(EnginePolicy):
    """A policy that answers each prompt as the script says, and records the limits on the answers' lengths."""

    script: dict[str, str]
    limits: list[int]

    def complete(self, prompts: list[list[int]], max_new_tokens: int, *_: object, **__: object) -> list[list[int]]:
        self.limits.append(max_new_tokens)
        answers = [self.script[BYTES.decode(prompt)] for prompt in prompts]
        return [[*BYTES(answer)["input_ids"], BYTES.eos_token_id][:max_new_tokens] for answer in answers]


BYTES = byte_tokenizer()


def _text_sample(prompt: str, response: str, sample_id: int) -> TrainingRow:
    return sample(BYTES(prompt)["input_ids"], [*BYTES(response)["input_ids"], BYTES.eos_token_id], sample_id)


def test_the_model_is_shown_its_latest_answer_and_the_cue_in_every_round() -> None:
    config = GPT2Config(vocab_size=258, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    model = add_reductions(GPT2LMHeadModel(config).eval())
    policy = Scripted(model, end_tokens=[BYTES.eos_token_id])
    policy.limits = []
    policy.script = {
        "1+1=": "3", "1+1=3 or: ": "2", "1+1=2 or: ": "2",
        "2+2=": "4", "2+2=4 or: ": "5", "2+2=5 or: ": "6",
        # cut at the length of the longest reference, and so shown without an end token
        "5+5=": "abcdef", "5+5=abc or: ": "10", "5+5=10 or: ": "ab",
    }  # fmt: skip
    samples = [_text_sample("1+1=", "2", 0), _text_sample("2+2=", "4", 1), _text_sample("5+5=", "10", 2)]
    asked = Correction(end_tokens=[BYTES.eos_token_id], cue_ids=BYTES(" or: ")["input_ids"])
    scores = evaluate(
        policy, samples, BYTES, batch_size=1, requests=EvaluationRequests(correction=asked, correction_rounds=2)
    )
    corrected = [[score.other_answers[f"corrected_{k}"][0] for k in (1, 2)] for score in scores]
    assert [score.answer for score in scores] == ["3", "4", "abc"]
    assert corrected == [["2", "2"], ["5", "6"], ["10", "ab"]]
    assert set(policy.limits) == {3}  # the longest reference of all rows, in every batch
    metrics = aggregate(scores)
    assert [metrics[f"corrected_{k}_exact_match"] for k in (1, 2)] == pytest.approx([2 / 3, 1 / 3])
    assert [metrics[f"corrected_{k}_wrong_to_right"] for k in (1, 2)] == pytest.approx([2 / 3, 0])
    assert [metrics[f"corrected_{k}_right_to_wrong"] for k in (1, 2)] == pytest.approx([1 / 3, 1 / 3])
    assert [metrics[f"corrected_{k}_unchanged"] for k in (1, 2)] == pytest.approx([0, 1 / 3])


def test_corrections_that_just_fit_into_the_models_positions_are_made() -> None:
    samples, asked = _uneven(6), Correction(end_tokens=[BYTES.eos_token_id], closing_ids=[7], cue_ids=[8, 9])
    length = corrected_length(samples, asked)
    assert length == 27 + 27 + 27 + 3
    config = GPT2Config(vocab_size=258, n_positions=length, n_embd=16, n_layer=1, n_head=2)
    model = add_reductions(GPT2LMHeadModel(config).eval())
    policy = EnginePolicy(model, end_tokens=[BYTES.eos_token_id])
    scores = evaluate(
        policy, samples, BYTES, batch_size=6, requests=EvaluationRequests(correction=asked, correction_rounds=2)
    )
    assert [len(score.other_answers) for score in scores] == [2] * 6
