"""Scores: the metrics of one row and of all rows, batches that fit the model, and corrections."""

import math

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from selfgen_ds.data.correction import Correction
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.evaluation.metrics import CORRECTION_METRICS, SampleScore, aggregate, curves
from selfgen_ds.evaluation.scores import EvaluationRequests, _batches, _right, corrected_length, evaluate
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.model.reductions import add_reductions
from tests.batches import sample


def _score(sample_id: int = 0, **changes: object) -> SampleScore:
    values: dict = {
        "sample_id": sample_id,
        "prompt": "p",
        "reference": "abc",
        "answer": "abc",
        "negative_log_likelihood": 2.0,
        "tokens": 4,
        "teacher_forced": [True, True, False, True],
        "free_running": [True, False, False, True],
    }
    return SampleScore(**(values | changes))


def test_a_row_has_the_means_over_its_tokens() -> None:
    metrics = _score().metrics()
    assert metrics == {
        "loss": 0.5,
        "exact_match": 1.0,
        "teacher_forced_accuracy": 0.75,
        "free_running_accuracy": 0.5,
    }


def test_recovery_counts_the_next_token_the_next_four_and_the_last_before_the_end_token() -> None:
    metrics = _score(recovery=[True, False, True, True, False, True, False]).metrics()
    assert (metrics["recovery_1"], metrics["recovery_4"], metrics["recovery_last"]) == (1.0, 0.75, 1.0)


def test_an_answer_with_another_text_is_no_exact_match() -> None:
    assert _score(answer="ab").metrics()["exact_match"] == 0.0


def test_sampled_answers_have_metrics_of_their_own() -> None:
    metrics = _score(sampled=[True, True, True, False], sampled_answer="abd").metrics()
    assert (metrics["sampled_exact_match"], metrics["sampled_accuracy"]) == (0.0, 0.75)
    assert metrics["exact_match"] == 1.0


def test_each_correction_is_scored_against_the_reference_and_the_answer_before_it() -> None:
    metrics = _score(answer="x", corrected_answers=["abc", "abc", "y", "y", "z"]).metrics()
    assert {kind: [metrics[f"corrected_{k}_{kind}"] for k in range(1, 6)] for kind in CORRECTION_METRICS} == {
        "exact_match": [1.0, 1.0, 0.0, 0.0, 0.0],
        "wrong_to_right": [1.0, 0.0, 0.0, 0.0, 0.0],
        "right_to_wrong": [0.0, 0.0, 1.0, 0.0, 0.0],
        "unchanged": [0.0, 1.0, 0.0, 1.0, 0.0],
    }


def test_correction_rates_are_shares_of_all_rows() -> None:
    answers = {"abc": "x", "x": "abc", "y": "abc", "z": "z"}
    metrics = aggregate([_score(i, answer=a, corrected_answers=[b]) for i, (a, b) in enumerate(answers.items())])
    assert (metrics["exact_match"], metrics["corrected_1_exact_match"]) == (0.25, 0.5)
    assert (metrics["corrected_1_wrong_to_right"], metrics["corrected_1_right_to_wrong"]) == (0.5, 0.25)
    assert metrics["corrected_1_unchanged"] == 0.25


def test_the_loss_is_a_mean_over_tokens_and_the_other_metrics_are_means_over_rows() -> None:
    short = _score(1, negative_log_likelihood=4.0, tokens=1, teacher_forced=[False], free_running=[False], answer="x")
    metrics = aggregate([_score(), short])
    assert metrics["loss"] == pytest.approx(6.0 / 5)
    assert metrics["teacher_forced_accuracy"] == pytest.approx(0.75 / 2)
    assert metrics["exact_match"] == 0.5


def test_a_curve_has_the_accuracy_of_the_rows_that_reach_a_position() -> None:
    short = _score(1, teacher_forced=[False], free_running=[False])
    assert curves([_score(), short]) == {
        "teacher_forced": [0.5, 1.0, 0.0, 1.0],
        "free_running": [0.5, 0.0, 0.0, 1.0],
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
    assert _right(answer, [1, 2, 3]) == expected


def test_the_score_of_a_perfect_row_is_perfect() -> None:
    metrics = _score(negative_log_likelihood=0.0, teacher_forced=[True] * 4, free_running=[True] * 4).metrics()
    assert all(math.isclose(value, 0.0 if name == "loss" else 1.0) for name, value in metrics.items())


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
    assert [(score.answer, score.corrected_answers) for score in scores] == [
        ("3", ["2", "2"]),
        ("4", ["5", "6"]),
        ("abc", ["10", "ab"]),
    ]
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
    assert [len(score.corrected_answers or []) for score in scores] == [2] * 6
