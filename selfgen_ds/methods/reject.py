"""What must not be reinforced in a drawn answer (`selfgen.reject`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import import_module

from transformers import PreTrainedTokenizerBase

from selfgen_ds.config import InputError

Spans = Callable[[str], Iterable[tuple[int, int]]]
"""From a text to what is rejected in it: characters, `(start, end)`."""


def load_reject(given: list[str] | str | None) -> Spans:
    """Regular expressions, or a function that is named `module:function`, as one function.

    Raises:
        InputError: An expression does not compile, or there is no such function.
    """
    if isinstance(given, str):
        module, _, name = given.partition(":")
        try:
            function = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(
                f"selfgen.reject: expected a list of regular expressions or module:function, got {given!r}: {error}"
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
    found = [(start, end) for start, end in spans(text) if start < end]
    if not found:
        return None

    def characters(tokens: int) -> int:
        return len(tokenizer.decode(ids[:tokens], skip_special_tokens=False))

    for token in candidates:
        begin, behind = characters(token), characters(token + 1)
        if any(start < max(behind, begin + 1) and begin < end for start, end in found):
            return token
    return None
