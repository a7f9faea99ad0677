"""Spans of a drawn answer that training must not reinforce (`selfgen.reject`)."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from importlib import import_module

from transformers import PreTrainedTokenizerBase

from selfgen_ds.errors import InputError

Spans = Callable[[str], Iterable[tuple[int, int]]]
"""Finds the rejected spans of a text: `(start, end)` in characters."""


def load_reject(given: list[str] | str | None) -> Spans:
    """Return one function that finds the rejected spans.

    Args:
        given: Regular expressions, or the name of a function (`module:function`), which is tried on a short text.

    Raises:
        InputError: An expression does not compile, or there is no such function, or it gives no spans.
    """
    if isinstance(given, str):
        module, _, name = given.partition(":")
        try:
            function = getattr(import_module(module), name)
            for start, end in function("An answer, to try it."):
                start, end = int(start), int(end)
        except Exception as error:  # a function of the user can raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                'selfgen.reject: expected a list of regular expressions, such as ["[0-9]+%"], or module:function, from '
                f"text to spans (start, end), got {given!r}: {reason}"
            ) from error
        return function
    expressions = []
    for pattern in given or []:
        try:
            expressions.append(re.compile(pattern))
        except re.error as error:
            raise InputError(f"selfgen.reject: {pattern!r} is not a valid regular expression: {error}") from error
    return lambda text: [match.span() for expression in expressions for match in expression.finditer(text)]


def first_rejected(
    ids: list[int], candidates: list[int], spans: Spans, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """Return the first candidate token that lies in a rejected span, or None.

    Args:
        ids: Token ids of the answer.
        candidates: Ascending positions in `ids`: the tokens that may be rejected.

    Raises:
        RuntimeError: The user's function raises, or gives no spans.
    """
    if not candidates:
        return None
    text = tokenizer.decode(ids, skip_special_tokens=False)
    rejected = []
    try:
        all_spans = [(int(start), int(end)) for start, end in spans(text)]
    except Exception as error:  # a function of the user can raise anything
        raise RuntimeError(f"selfgen.reject: no spans (start, end) of {text!r}: {error}") from error
    for start, end in all_spans:
        # By bisection, because the end of a token is only known from decoding all tokens before it.
        index = bisect_right(candidates, start, key=lambda token: _characters(ids, token, text, tokenizer)[1])
        if start < end and index < len(candidates) and _characters(ids, candidates[index], text, tokenizer)[0] < end:
            rejected.append(candidates[index])
    return min(rejected, default=None)


def _characters(ids: list[int], token: int, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return where a token begins and ends in the text of `ids`; several tokens can share a character."""
    before, after = (tokenizer.decode(ids[:end], skip_special_tokens=False) for end in (token, token + 1))
    # A part of a character is decoded to U+FFFD, once or several times.
    begin, end = (_common_prefix(some, text) for some in (before.rstrip("\ufffd"), after))
    return begin, max(end if text.startswith(after) else end + 1, begin + 1)


def _common_prefix(some: str, other: str) -> int:
    """Return the length of the longest common prefix of two texts, in characters."""
    return next((i for i, (a, b) in enumerate(zip(some, other, strict=False)) if a != b), min(len(some), len(other)))
