"""Metrics of an answer's text against the reference's, by the libraries that the field uses.

Every metric of many rows is a function of sums over the rows. So a row has, for each metric, the numbers that are
summed (its statistics): a value and a weight for a mean, the counts of n-grams for BLEU. An interval then comes from
sums over drawn rows, without a look at the texts.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from selfgen_ds.errors import InputError
from selfgen_ds.evaluation.final_answers import final_answer, normalized, same_final_answer

Statistics = dict[str, list[float]]
"""Metric -> the numbers of a row that are summed over rows."""
OwnMetric = Callable[[str, str, str], float]
"""`(prompt, answer, reference) -> value`: a metric of the user's own."""

_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese."""
_LATIN = re.compile("[A-Za-z0-9]")
_REPEATED = 4  # words of the n-grams that `repetition` counts


@dataclass(frozen=True, kw_only=True)
class TextMetrics:
    """Compute the statistics of answers."""

    with_ter: bool = True
    """Whether TER is computed, which takes a second for an answer of a thousand words."""
    embedder: Any = None
    """A `sentence_transformers.SentenceTransformer`, or None for no `embedding_distance`."""
    own: tuple[str, OwnMetric] | None = None
    """The name and the function of a metric of the user's own."""

    @property
    def source(self) -> str:
        """The code of the module of the user's metric, which may be changed between two starts."""
        return "" if self.own is None else inspect.getsource(inspect.getmodule(self.own[1]) or self.own[1])

    def statistics(self, prompts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> list[Statistics]:
        """Return the statistics of every answer.

        Raises:
            InputError: The metric of the user's own raises, or returns no number.
        """
        rows = [self._of_texts(answer, reference) for answer, reference in zip(answers, references, strict=True)]
        if self.embedder is not None and rows:
            distances = embedding_distances(self.embedder, answers, references)
            for row, distance in zip(rows, distances, strict=True):
                row["embedding_distance"] = [distance, 1.0]
        if self.own is not None:
            name, function = self.own
            for row, *texts in zip(rows, prompts, answers, references, strict=True):
                row[name] = [_own_value(name, function, *texts), 1.0]
        return rows

    def _of_texts(self, answer: str, reference: str) -> Statistics:
        expected = final_answer(reference)
        row: Statistics = {
            "exact_match": [float(answer == reference), 1.0],
            "normalized_match": [float(normalized(answer) == normalized(reference)), 1.0],
            "final_answer": [0.0, 0.0] if expected is None else [float(same_final_answer(answer, expected)), 1.0],
            "repetition": repetition(answer),
            "length_ratio": [float(len(answer)), float(len(reference))],
        }
        if reference.strip():
            row["chrf"] = _counts("chrf", answer, reference)
        if not is_counted("rouge_1", reference):
            return row
        rouge = _rouge(not _LATIN.search(reference)).score(reference, answer)
        row |= {name: [rouge[library].fmeasure, 1.0] for name, library in _ROUGE.items()}
        for name in ("bleu", "ter") if self.with_ter else ("bleu",):
            row[name] = _counts(name, spaced(answer), spaced(reference))
        return row


def _counts(name: str, answer: str, reference: str) -> list[float]:
    counts = corpus_score(name)._extract_corpus_statistics([answer], [[reference]])[0]
    return [float(number) for number in counts]


def spaced(text: str) -> str:
    """Return a text with spaces around the characters of scripts that are written without spaces, each a word then."""
    return _UNSPACED.sub(r" \g<0> ", text)


def is_counted(metric: str, reference: str) -> bool:
    """Return whether a metric says something of answers to a row with this reference.

    Metrics of words and their n-grams say nothing of a single word, and `final_answer` nothing of a text without one.
    chrF counts characters, and needs one.
    """
    if metric == "final_answer":
        return final_answer(reference) is not None
    if metric == "chrf":
        return bool(reference.strip())
    return len(spaced(reference).split()) >= 2 or metric not in (*_ROUGE, "bleu", "ter")


@cache
def corpus_score(name: str) -> Any:
    """Return sacrebleu's score of a name: `bleu`, `chrf` or `ter`."""
    from sacrebleu import metrics  # not needed by every command

    return {"bleu": metrics.BLEU, "chrf": metrics.CHRF, "ter": metrics.TER}[name]()


class _Words:
    """Tokenizes texts without Latin letters, of which `rouge-score` itself sees nothing."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", spaced(text.lower()))


@cache
def _rouge(other_script: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # not needed by every command

    tokenizer = _Words() if other_script else None
    return RougeScorer(list(_ROUGE.values()), use_stemmer=True, tokenizer=tokenizer)


def repetition(text: str) -> list[float]:
    """Return the number of 4-grams of words that occurred before in a text, and the number of all.

    Their ratio is seq-rep-4 of Welleck et al. 2019 (arXiv 1908.04319), counted in words instead of tokens.
    """
    words = text.split()
    grams = [tuple(words[i : i + _REPEATED]) for i in range(len(words) - _REPEATED + 1)]
    return [float(len(grams) - len(set(grams))), float(len(grams))]


def embedding_distances(embedder: Any, answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return, per answer, 1 minus the cosine of the angle between its sentence embedding and the reference's.

    A text that is there several times, such as the greedy answer to a repeated prompt, is embedded once.

    Cen et al. (arXiv 2410.14655) measure the distance of embeddings between an answer and the reference; which
    embeddings and which distance is not public.
    """
    texts = list(dict.fromkeys([*answers, *references]))
    vectors = dict(zip(texts, embedder.encode(texts, normalize_embeddings=True, show_progress_bar=False), strict=True))
    return [
        1.0 - float((vectors[answer] * vectors[reference]).sum())
        for answer, reference in zip(answers, references, strict=True)
    ]


def load_embedder(model: str) -> Any:
    """Return a model of `sentence-transformers`.

    Raises:
        InputError: The package is not installed, or there is no such model.
    """
    try:
        from sentence_transformers import SentenceTransformer  # an optional dependency
    except ImportError as error:
        raise InputError(
            "--embedding_model: the package sentence-transformers is not installed; "
            "`pip install selfgen-ds[embeddings]` brings it"
        ) from error
    try:
        return SentenceTransformer(model)
    except Exception as error:  # the type depends on what is missing
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"--embedding_model: cannot load {model!r}: {reason}") from error


def load_metric(given: str) -> tuple[str, OwnMetric]:
    """Return the name and the function of a metric of the user's own, `module:function`, which is tried once.

    Raises:
        InputError: There is no such function, or it raises, or it returns no number.
    """
    module, _, name = given.partition(":")
    try:
        function = getattr(import_module(module), name)
        float(function("A prompt, to try it.", "An answer.", "A reference."))
    except Exception as error:  # a function of the user can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            "--metric: expected module:function, from the texts (prompt, answer, reference) to a number, "
            f"got {given!r}: {reason}"
        ) from error
    return name, function


def _own_value(name: str, function: OwnMetric, prompt: str, answer: str, reference: str) -> float:
    try:
        value = float(function(prompt, answer, reference))
    except Exception as error:  # a user's function can raise anything
        raise InputError(
            f"--metric: {name} raised {type(error).__name__}: {error}; the answer was {answer!r}"
        ) from error
    if not math.isfinite(value):
        raise InputError(f"--metric: {name} returned {value}, expected a finite number; the answer was {answer!r}")
    return value
