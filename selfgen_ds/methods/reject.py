"""What must not be reinforced in a drawn answer (`selfgen.reject`)."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from importlib import import_module

from transformers import PreTrainedTokenizerBase

from selfgen_ds.errors import InputError

Spans = Callable[[str], Iterable[tuple[int, int]]]
"""From a text to what is rejected in it: characters, `(start, end)`."""


def load_reject(given: list[str] | str | None) -> Spans:
    """Regular expressions, or a function that is named `module:function` (which is tried), as one function.

    Raises:
        InputError: An expression does not compile, or there is no function that gives spans.
    """
    if isinstance(given, str):
        module, _, name = given.partition(":")
        try:
            function = getattr(import_module(module), name)
            for start, end in function("An answer, to try it."):
                start, end = int(start), int(end)
        except Exception as error:  # a function of the user's can raise anything
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
            raise InputError(f"selfgen.reject: {pattern!r} is no regular expression: {error}") from error
    return lambda text: [found.span() for expression in expressions for found in expression.finditer(text)]


def first_rejected(
    ids: list[int], candidates: list[int], spans: Spans, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """The first of some tokens of an answer that lies in a rejected span; None if there is none.

    Args:
        ids: Of the answer.
        candidates: Tokens that may be rejected, ascending numbers into `ids`.
    """
    if not candidates:
        return None
    text = tokenizer.decode(ids, skip_special_tokens=False)
    hits = []
    try:
        found = [(int(start), int(end)) for start, end in spans(text)]
    except Exception as error:  # a function of the user's can raise anything
        raise RuntimeError(f"selfgen.reject: no spans (start, end) of {text!r}: {error}") from error
    for start, end in found:
        # looked for by halves: where a token ends is told by decoding all before it
        place = bisect_right(candidates, start, key=lambda token: _characters(ids, token, text, tokenizer)[1])
        if start < end and place < len(candidates) and _characters(ids, candidates[place], text, tokenizer)[0] < end:
            hits.append(candidates[place])
    return min(hits, default=None)


def _characters(ids: list[int], token: int, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Where a token begins and ends in the text of `ids`. A character of several tokens belongs to each of them."""
    before, after = (tokenizer.decode(ids[:end], skip_special_tokens=False) for end in (token, token + 1))
    # the part of a character is decoded to U+FFFD, one or several
    begin, behind = (_in_common(some, text) for some in (before.rstrip("\ufffd"), after))
    return begin, max(behind if text.startswith(after) else behind + 1, begin + 1)


def _in_common(some: str, other: str) -> int:
    """Characters that two texts start with alike."""
    return next((i for i, (a, b) in enumerate(zip(some, other, strict=False)) if a != b), min(len(some), len(other)))
