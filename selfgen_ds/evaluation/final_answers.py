"""The final answers that texts come to, such as the number after `####` in GSM8K, and whether two are the same."""

from __future__ import annotations

import logging
import re
import string

_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_NUMBER = re.compile(r"\s*[$€£]?\s*[-+]?\d[\d,]*(?:\.\d+)?\s*%?\s*\.?\s*")
_WITH_UNIT = re.compile(rf"({_NUMBER.pattern})(?:[^\W\d_]{{2}}|(?<=\s)[^\W\d_](?!\s*\d))")  # 5kg, 5 m, not 2x or 2 x 3
_DATE = re.compile(r"\d+[-./]\d+[-./]\d+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Return a text in lower case, without punctuation, English articles and repeated white space.

    This is the normalization of SQuAD's exact match (Rajpurkar et al. 2016, arXiv 1606.05250). A text that has nothing
    else, such as `A`, stays as it is, in lower case.
    """
    without = " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
    return without or " ".join(text.lower().split())


def final_answer(reference: str) -> str | None:
    """Return what a reference comes to, or None if it does not say so.

    This is what follows the last `####` in its line, or else the content of the last `\\boxed{}`, or else the whole
    reference, if it is a number.
    """
    marked = _marked(reference)
    return reference.strip() if marked is None and _NUMBER.fullmatch(reference) else marked


def same_final_answer(answer: str, expected: str) -> bool:
    """Return whether an answer comes to the expected final answer.

    The final answer is marked as in `final_answer`; in an answer without marks, `math-verify` looks for a number or an
    expression. Numbers and expressions are the same if they are so mathematically (`math_verify.verify`: up to six
    digits after the point, and up to simplification), other texts if their normalized texts are. A unit may follow a
    marked number.

    Args:
        expected: What `final_answer` returns for the reference.
    """
    given = _marked(answer)
    if (answer if given is None else given).strip().casefold() == expected.casefold():
        return True
    from math_verify import verify  # slow to import

    if gold := _parsed(expected):
        if given is None:
            return verify(gold, _parse(answer))
        number = _WITH_UNIT.match(given) if _NUMBER.fullmatch(expected) else None
        return verify(gold, _parsed(given)) or (number is not None and verify(gold, _parsed(number[1])))
    return normalized(answer if given is None else given) == normalized(expected)


def _marked(text: str) -> str | None:
    if hashes := _HASHES.findall(text):
        return hashes[-1].strip()
    return _boxed(text)


def _boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{}`, with the braces in it, or None."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, first = 0, start + len("\\boxed{")
    for position in range(first, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth < 0:
            return text[first:position].strip()
    return None


def _parsed(final: str) -> list:
    """Read a final answer as a number or an expression; an empty list if it is neither."""
    if _NUMBER.fullmatch(final):
        return _parse(final)
    is_expression = re.search(r"[\d\\^=+*/]", final) and not _DATE.search(final)
    return _parse(f"\\boxed{{{final}}}") if is_expression else []


def _parse(text: str) -> list:
    from math_verify import parse  # slow to import

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every text that it cannot read
    return parse(text)
