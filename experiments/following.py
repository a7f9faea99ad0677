"""Whether answers of `builtin:random_start` follow from their own first letter, whatever the reference chose."""

from __future__ import annotations


def follows(prompt: str, answer: str, reference: str) -> float:
    """Return the share of an answer's letters after the first that are right, given the letters before them.

    Args:
        prompt: Pairs of a key and a value, and `=`, such as `FaBc=`.
        answer: A key, and then values and keys in turn, such as `BcC`.
        reference: Gives the number of letters alone.
    """
    value_of = dict(zip(prompt[0:-1:2], prompt[1:-1:2], strict=False))
    right = 0
    for place, letter in enumerate(answer[1 : len(reference)], start=1):
        before = answer[place - 1]
        right += letter == (value_of.get(before) if place % 2 else before.upper())
    return right / (len(reference) - 1)
