"""Built-in tasks: procedural rows whose answer is a deterministic function of the prompt.

The reference therefore stays the right target after a wrong token, which is what `recovery` measures: one
wrong token is forced into the answer, the model goes on by itself, and its tokens are held against the
reference.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_TRAIN_ROWS = 65_536
_TEST_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example as text."""

    prompt: str
    completion: str
    where: str = field(default="", compare=False)
    """Files: file and line that it was read from."""
    forced: str | None = None
    """Built-in tasks: start of the completion, up to and with one wrong token."""
    rest: str | None = None
    """Built-in tasks: what is right after `forced`."""


_SYMBOLS, _HOPS = 8, 6


def _pointer_chase(rng: random.Random) -> Row:
    """Follow a random 8-cycle: `FaBc...A=` -> `cCdD...`; capitals are keys, small letters values.

    The prompt holds the 8 pairs KEY value in random order, a start key and `=`; the answer 6 hops, each
    written as the value and restated as the key. Restating what was just written is all that teacher
    forcing needs after the look-up, so that one wrong value sends the rest along a wrong path.
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
    at = 4  # the value of the third hop
    wrong = rng.choice([v for v in value if v != completion[at]])
    return Row(
        prompt=f"{pairs}{key[start]}=",
        completion=completion,
        forced=completion[:at] + wrong,
        rest=completion[at + 1 :],
    )


_OPERANDS = 16


def _running_sum(rng: random.Random) -> Row:
    """Running sums modulo 10: `3141592653589793=` -> `3489...`.

    A control: each sum can be read off the operands so far, teacher forcing is enough.
    """
    operands = [rng.randrange(10) for _ in range(_OPERANDS)]
    sums = [sum(operands[: i + 1]) % 10 for i in range(_OPERANDS)]
    completion = "".join(map(str, sums))
    at = 2
    wrong = rng.choice([str(d) for d in range(10) if d != sums[at]])
    return Row(
        prompt="".join(map(str, operands)) + "=",
        completion=completion,
        forced=completion[:at] + wrong,
        rest=completion[at + 1 :],
    )


TASKS: dict[str, Callable[[random.Random], Row]] = {
    "pointer_chase": _pointer_chase,
    "running_sum": _running_sum,
}


def generate(task: str, split: str) -> Iterator[Row]:
    """The rows of a built-in task's `train` or `test` set, the same ones in every run.

    A prompt belongs to the test set if its checksum says so, hence the sets cannot overlap. No prompt
    comes twice.
    """
    count = _TRAIN_ROWS if split == "train" else _TEST_ROWS
    rng = random.Random(f"{task}/{split}")
    seen: set[str] = set()
    while len(seen) < count:
        row = TASKS[task](rng)
        in_test = zlib.crc32(row.prompt.encode()) % 16 == 0
        if row.prompt not in seen and in_test == (split == "test"):
            seen.add(row.prompt)
            yield row
