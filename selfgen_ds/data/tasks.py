"""Built-in tasks: procedural pairs of texts whose answer is a deterministic function of the prompt.

The reference therefore stays the right target after a wrong token. The recovery metrics of the evaluation rest on
that: the answer is given a start that ends with one wrong token, the model continues it, and its tokens are compared
with the reference.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

BUILTIN = "builtin:"
_TRAIN_ROWS = 65_536
_TEST_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class ForcedErrorText:
    """A completion that starts with an error, as two texts."""

    start: str
    """The start of the completion; its last token is wrong."""
    rest: str
    """The rest of the completion, which is right."""


Example = tuple[str, str, ForcedErrorText]
"""A prompt, its completion, and the completion with an error."""

_SYMBOLS, _HOPS = 8, 6


def _pointer_chase(rng: random.Random) -> Example:
    """Follow a random 8-cycle: `FaBc...A=` -> `cCdD...`; capitals are keys, small letters values.

    The prompt holds the 8 pairs KEY value in random order, a start key, and `=`. The answer is 6 hops, each written
    as the value and restated as the key. Restating the value that was just written is all that teacher forcing needs
    after the look-up, so that one wrong value sends the rest along a wrong path.
    """
    cycle = rng.sample(range(_SYMBOLS), _SYMBOLS)
    following = {cycle[i]: cycle[(i + 1) % _SYMBOLS] for i in range(_SYMBOLS)}
    value, key = "abcdefgh", "ABCDEFGH"
    pairs = "".join(key[s] + value[following[s]] for s in rng.sample(range(_SYMBOLS), _SYMBOLS))
    start = rng.randrange(_SYMBOLS)
    path = [start]
    for _ in range(_HOPS):
        path.append(following[path[-1]])
    completion = "".join(value[s] + key[s] for s in path[1:])
    third_hop = 4
    return f"{pairs}{key[start]}=", completion, _forced_error_text(completion, third_hop, value, rng)


_OPERANDS = 16


def _running_sum(rng: random.Random) -> Example:
    """Add digits modulo 10, with all running sums: `3141592653589793=` -> `3489...`.

    A control: each sum can be read off the operands so far, so that teacher forcing is enough.
    """
    operands = [rng.randrange(10) for _ in range(_OPERANDS)]
    sums = [sum(operands[: i + 1]) % 10 for i in range(_OPERANDS)]
    completion = "".join(map(str, sums))
    third_sum = 2
    prompt = "".join(map(str, operands)) + "="
    return prompt, completion, _forced_error_text(completion, third_sum, "0123456789", rng)


def _forced_error_text(completion: str, index: int, alphabet: str, rng: random.Random) -> ForcedErrorText:
    """Put another character of the alphabet at one index of a completion."""
    wrong = rng.choice([character for character in alphabet if character != completion[index]])
    return ForcedErrorText(start=completion[:index] + wrong, rest=completion[index + 1 :])


TASKS: dict[str, Callable[[random.Random], Example]] = {
    "pointer_chase": _pointer_chase,
    "running_sum": _running_sum,
}


def task_of(path: str) -> str | None:
    """Return the built-in task that the path of a source names, or None if the path names other data."""
    return path.removeprefix(BUILTIN) if path.startswith(BUILTIN) else None


def generate(task: str, split: str) -> Iterator[tuple[str, str]]:
    """Yield prompts and completions of a built-in task's `train` or `test` set, the same in every run."""
    return ((prompt, completion) for prompt, completion, _ in _examples(task, split))


@cache
def forced_error_texts(task: str) -> list[ForcedErrorText]:
    """Return an error for every row of a built-in task's `test` set, in the order of `generate`."""
    return [error for *_, error in _examples(task, "test")]


def _examples(task: str, split: str) -> Iterator[Example]:
    """Yield every prompt once.

    A prompt belongs to the test set if its checksum says so, hence the sets cannot overlap.
    """
    count = _TRAIN_ROWS if split == "train" else _TEST_ROWS
    rng = random.Random(f"{task}/{split}")
    seen: set[str] = set()
    while len(seen) < count:
        prompt, completion, error = TASKS[task](rng)
        in_test = zlib.crc32(prompt.encode()) % 16 == 0
        if prompt not in seen and in_test == (split == "test"):
            seen.add(prompt)
            yield prompt, completion, error
