"""Text metrics: every one against its reference library or by hand, and a metric of the user's own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf, corpus_ter

from selfgen_ds.errors import InputError
from selfgen_ds.evaluation.metrics import values
from selfgen_ds.evaluation.text_metrics import TextMetrics, embedding_distances, load_metric, repetition

REFERENCES = ["The cat sat on the mat.", "A river runs through the old town.", "Nobody knows how it will end."]
ANSWERS = ["The cats sat on a mat.", "A river runs through it.", ""]


@pytest.fixture(scope="module")
def metrics() -> dict[str, float]:
    return values(TextMetrics().statistics(["p"] * 3, ANSWERS, REFERENCES))


def test_corpus_scores_are_those_of_sacrebleu(metrics: dict[str, float]) -> None:
    assert metrics["bleu"] == pytest.approx(corpus_bleu(ANSWERS, [REFERENCES]).score)
    assert metrics["chrf"] == pytest.approx(corpus_chrf(ANSWERS, [REFERENCES]).score)
    assert metrics["ter"] == pytest.approx(corpus_ter(ANSWERS, [REFERENCES]).score)


def test_rouge_is_the_mean_f_measure_of_rouge_score(metrics: dict[str, float]) -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(reference, answer) for answer, reference in zip(ANSWERS, REFERENCES, strict=True)]
    for ours, theirs in {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}.items():
        assert metrics[ours] == pytest.approx(np.mean([score[theirs].fmeasure for score in scores]))


def test_the_length_ratio_counts_characters_of_all_rows(metrics: dict[str, float]) -> None:
    assert metrics["length_ratio"] == pytest.approx(sum(map(len, ANSWERS)) / sum(map(len, REFERENCES)))


def test_a_match_may_be_exact_or_normalized() -> None:
    found = values(TextMetrics().statistics(["p"] * 2, ["The end", "the end."], ["The end", "The end"]))
    assert (found["exact_match"], found["normalized_match"]) == (0.5, 1.0)


def test_final_answers_are_a_share_of_the_rows_that_have_one() -> None:
    answers, references = ["it is 7", "8", "words"], ["so\n#### 7", "#### 9", "no number here"]
    assert values(TextMetrics().statistics(["p"] * 3, answers, references))["final_answer"] == 0.5
    assert "final_answer" not in values(TextMetrics().statistics(["p"], ["words"], ["no number here"]))


def test_metrics_of_words_are_left_out_for_a_single_word_and_chrf_is_not() -> None:
    found = values(TextMetrics().statistics(["p"], ["abc"], ["abd"]))
    assert not {"rouge_1", "bleu", "ter"} & found.keys()
    assert found["chrf"] == pytest.approx(corpus_chrf(["abc"], [["abd"]]).score)


def test_texts_without_spaces_or_latin_letters_have_words_too() -> None:
    answer, reference = "猫坐在垫子上。", "猫躺在垫子上。"
    found = values(TextMetrics().statistics(["p"], [answer], [reference]))
    assert found["bleu"] == pytest.approx(corpus_bleu([" ".join(answer)], [[" ".join(reference)]]).score)
    assert found["rouge_1"] == pytest.approx(5 / 6)
    assert values(TextMetrics().statistics(["p"], ["мама мыла"], ["мама мыла раму"]))["rouge_1"] == pytest.approx(0.8)


def test_a_metric_that_is_nan_on_a_row_is_nan_and_does_not_vanish() -> None:
    assert math.isnan(values([{"loss": [1.0, 1.0]}, {"loss": [math.nan, 1.0]}])["loss"])


@pytest.mark.parametrize(
    ("text", "repeated", "every"), [("a b c d a b c d", 1, 5), ("x x x x x x", 2, 3), ("a b c", 0, 0), ("", 0, 0)]
)
def test_repetition_counts_four_grams_that_occurred_before(text: str, repeated: int, every: int) -> None:
    assert repetition(text) == [repeated, every]


class Embedder:
    """Embeds a text as its counts of `a` and `b`, normalized."""

    def encode(self, texts: list[str], **_: object) -> np.ndarray:
        counts = np.array([[text.count("a"), text.count("b")] for text in texts], dtype=float)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_the_embedding_distance_is_one_minus_the_cosine() -> None:
    distances = embedding_distances(Embedder(), ["a", "ab", "aab", "a"], ["aa", "a", "b", "b"])
    assert distances == pytest.approx([0.0, 1 - math.sqrt(0.5), 1 - 1 / math.sqrt(5), 1.0])


def test_a_metric_of_the_users_own_is_a_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics.py").write_text(
        "def same_start(prompt, answer, reference):\n    return answer[:1] == reference[:1]\n"
        "def fails(prompt, answer, reference):\n    return 1 / (len(answer) - 3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = TextMetrics(own=load_metric("my_metrics:same_start"))
    assert values(own.statistics(["p"] * 2, ["ab", "b"], ["ac", "c"]))["same_start"] == 0.5
    failing = TextMetrics(own=load_metric("my_metrics:fails"))
    endless = TextMetrics(own=("endless", lambda *_: math.inf))
    with pytest.raises(InputError, match="endless returned inf, expected a finite number"):
        endless.statistics(["p"], ["a"], ["b"])
    with pytest.raises(InputError, match=r"--metric: fails raised ZeroDivisionError: .*; the answer was 'abc'"):
        failing.statistics(["p"], ["abc"], ["abc"])


@pytest.mark.parametrize("given", ["no_such_module:f", "math:no_such_name", "math", "math:sqrt"])
def test_a_metric_that_is_no_such_function_is_refused(given: str) -> None:
    with pytest.raises(InputError, match="--metric: expected module:function"):
        load_metric(given)
