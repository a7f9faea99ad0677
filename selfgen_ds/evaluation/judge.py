"""A judge: a model behind an OpenAI-compatible endpoint that says which of two answers to a prompt is better."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfgen_ds.errors import InputError
from selfgen_ds.evaluation import predictions
from selfgen_ds.evaluation.metrics import SampleScore
from selfgen_ds.files import naming
from selfgen_ds.progress import bar

log = logging.getLogger("selfgen_ds")

_AT_ONCE = 8  # requests
_TRIES, _PAUSE, _TIMEOUT = 4, 2.0, 120.0  # requests, and seconds
_RESAMPLES = 1000
_MARKS = r"[\s*_`\"'()\[\].!]*"
_VERDICT = re.compile(
    rf"(?:^|[:>\n]|\b(?:answer|response|verdict|winner|choose|prefer|is)\b){_MARKS}(A|B|(?:a )?tie)"
    rf"(?: is (?:the )?(?:better|best)(?: one| answer)?)?{_MARKS}$",
    re.IGNORECASE,
)
"""A verdict at the end of what a judge says: a letter in the middle of a reason is none."""
_QUESTION = """Which of two answers to a prompt is better? Judge whether they are right, and do what the prompt asks.
Say "A", "B" or "tie", and nothing else.

<prompt>
{prompt}
</prompt>

<answer A>
{first}
</answer A>

<answer B>
{second}
</answer B>"""


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What a judge has said of some rows."""

    wins: list[float]
    """Per row, how far the greedy answer beats the other one: 1, 0.5 for a tie, or 0."""
    unclear: float
    """Share of the verdicts that were none of A, B and tie, and count as ties."""
    by_place: float
    """Share of the pairs whose two orders got opposite verdicts, which are ties."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A judge that compares a model's answers with other answers to the same prompts."""

    url: str
    """The endpoint, such as `http://localhost:8000/v1`."""
    model: str
    """The name by which the endpoint knows the judge."""
    journal: Path
    """File of the verdicts so far: a later start asks only for the others."""

    def check(self) -> None:
        """Ask a question, so that an endpoint that does not answer is known before the model has.

        Raises:
            InputError: The judge does not answer.
        """
        self._ask(_QUESTION.format(prompt="1 + 1 =", first="2", second="3"), tries=2)

    def verdicts(self, scores: Sequence[SampleScore], others: Sequence[str]) -> Verdicts:
        """Return what the judge says of the greedy answers.

        Every pair is shown in both orders, and the two verdicts are averaged, because judges prefer a place.

        Raises:
            InputError: The judge does not answer, or gives no verdict on any row.
        """
        known = self._read()
        asked = [
            (score, other, swapped)
            for score, other in zip(scores, others, strict=True)
            for swapped in (False, True)
            if self._key(score, other, swapped) not in known
        ]
        if len(asked) < 2 * len(scores):
            given = 2 * len(scores) - len(asked)
            log.info("%d of %d verdicts have been given before (%s)", given, 2 * len(scores), self.journal)
        with (
            naming(self.journal),
            open(self.journal, "a", encoding="utf-8") as file,
            ThreadPoolExecutor(_AT_ONCE) as pool,
            bar("judge", "verdict", total=len(asked)) as shown,
        ):
            verdicts = pool.map(lambda pair: self._verdict(*pair), asked)
            for pair, verdict in zip(asked, verdicts, strict=True):
                known[self._key(*pair)] = verdict
                if verdict is not None:  # what is no verdict is asked for again in a later start
                    file.write(json.dumps([self._key(*pair), verdict]) + "\n")
                    file.flush()
                shown.update()
        pairs = list(zip(scores, others, strict=True))
        said = [[known[self._key(score, other, swapped)] for swapped in (False, True)] for score, other in pairs]
        wins = [sum(0.5 if verdict is None else verdict for verdict in both) / 2 for both in said]
        unclear = sum(verdict is None for both in said for verdict in both)
        by_place = sum(sorted(map(str, both)) == ["0.0", "1.0"] for both in said)
        if unclear == 2 * len(said):
            raise InputError(f"--judge_model: no verdict of {self.model} was one of A, B and tie")
        for number, of, told in (
            (unclear, 2 * len(said), "verdicts were none of A, B and tie, and"),
            (by_place, len(said), "pairs were decided by the answers' order alone; they"),
        ):
            if number:
                log.warning("%d of %d %s count as ties", number, of, told)
        return Verdicts(wins=wins, unclear=unclear / (2 * len(said)), by_place=by_place / len(said))

    def _read(self) -> dict[str, float | None]:
        lines = self.journal.read_bytes().split(b"\n") if self.journal.exists() else []
        known: dict[str, float | None] = {}
        for line in lines:
            with suppress(ValueError):  # the line that was being written when the process ended
                key, verdict = json.loads(line)
                known[key] = verdict
        return known

    def _key(self, score: SampleScore, other: str, swapped: bool) -> str:
        """Return what a verdict depends on: the judge and the question, in which equal answers have an order too."""
        return hashlib.sha256(f"{self.model}\0{swapped}\0{_question(score, other, swapped)}".encode()).hexdigest()

    def _verdict(self, score: SampleScore, other: str, swapped: bool) -> float | None:
        """Ask for a verdict. None if what the judge says ends with none, as in a refusal."""
        said = verdict_in(self._ask(_question(score, other, swapped)))
        return {"A": float(not swapped), "B": float(swapped), "TIE": 0.5, None: None}[said]

    def _ask(self, question: str, tries: int = _TRIES) -> str:
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": question}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        problem = ""
        for number in range(tries):
            time.sleep(_PAUSE * number)
            said = b""
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                    said = response.read()
                return str(json.loads(said)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}: {_shown(error.read())}"
                if error.code in (401, 403):
                    problem += " (a key is read from OPENAI_API_KEY)"
                if error.code < 500 and error.code != 429:  # another try would get the same answer
                    break
            except (ValueError, KeyError, IndexError, TypeError):
                problem = f"it answers {_shown(said)}"
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        raise InputError(f"--judge_url: {url} gives no verdict: {problem}; the verdicts so far are kept")


def _shown(body: bytes) -> str:
    """Return the start of what a server has answered, on one line."""
    return repr(" ".join(body.decode("utf-8", "replace").split())[:200])


def verdict_in(text: str) -> str | None:
    """Return the verdict with which a text ends: A, B or TIE; None if it ends with none."""
    found = _VERDICT.search(text.strip())
    return None if found is None else found[1].upper().removeprefix("A ")


def _question(score: SampleScore, other: str, swapped: bool) -> str:
    first, second = (other, score.answer) if swapped else (score.answer, other)
    return _QUESTION.format(prompt=score.prompt, first=first, second=second)


def length_controlled(wins: Sequence[float], answers: Sequence[str], others: Sequence[str]) -> dict[str, float]:
    """Return the win rate that the judge would give to answers as long as the others, with its 95 % interval.

    This is the length-controlled win rate of Dubois et al. 2024 (arXiv 2404.04475) without its terms for the difficulty
    of single prompts: a logistic regression of the wins on tanh(d / s), where d is the difference of the lengths in
    characters and s the standard deviation of these differences, read off at d = 0. The interval is that of a bootstrap
    over rows.
    """
    d = np.array([len(a) - len(b) for a, b in zip(answers, others, strict=True)], dtype=float)
    x = np.tanh(d / d.std()) if d.std() else np.zeros_like(d)
    y, rng = np.array(wins, dtype=float), np.random.default_rng(0)
    drawn = [_at_equal_length(x[rows], y[rows]) for rows in rng.integers(len(y), size=(_RESAMPLES, len(y)))]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": _at_equal_length(x, y), "low": float(low), "high": float(high)}


def _at_equal_length(x: np.ndarray, y: np.ndarray) -> float:
    """Fit `y = sigmoid(theta + phi x)` by Newton's method, and return sigmoid(theta).

    A weak ridge keeps the fit finite where all rows are won.
    """
    design, ridge, fit = np.stack([np.ones_like(x), x], axis=1), 1e-2 * np.eye(2), np.zeros(2)
    for _ in range(30):
        p = 1 / (1 + np.exp(-design @ fit))
        gradient = design.T @ (y - p) - ridge @ fit
        step = np.linalg.solve((design * (p * (1 - p))[:, None]).T @ design + ridge, gradient)
        fit = fit + np.clip(step, -2, 2)
    return float(1 / (1 + np.exp(-fit[0])))


def other_answers(against: str, scores: Sequence[SampleScore]) -> list[str]:
    """Return the answers that the model's are compared with.

    Args:
        against: `reference`, or a folder with the `predictions.jsonl` of another evaluation of the same rows.

    Raises:
        InputError: The folder has no predictions, or those of other rows.
    """
    if against == "reference":
        return [score.reference for score in scores]
    path = Path(against) / predictions.FILE
    try:
        answers = {(row.sample_id, row.reference): row.answer for row in predictions.read(path)}
    except OSError as error:
        raise InputError(f"--judge_against: {path}: no predictions of an evaluation: {error}") from error
    except InputError as error:
        raise InputError(f"--judge_against: {error}") from error
    keys = [(score.sample_id, score.reference) for score in scores]
    if missing := [key[0] for key in keys if key not in answers]:
        raise InputError(
            f"--judge_against: {path} lacks {len(missing)} of {len(keys)} rows, the first is row {missing[0]}; "
            "evaluate both on the same rows"
        )
    return [answers[key] for key in keys]
