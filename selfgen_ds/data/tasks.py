"""Built-in tasks: procedural pairs of texts whose answer is a deterministic function of the prompt.

The reference therefore stays the right target after a wrong token. The recovery metrics of the evaluation rest on
that: the answer is given a start that ends with one wrong token, the model continues it, and its tokens are compared
with the reference. `random_start` is different on purpose: there, the first letter decides the rest.
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
SPLITS = ("train", "dev", "test")
"""`builtin:sort/dev` names the split of a task. Settings are chosen on `dev`, whose rows are in neither other split."""


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
    pairs, path = _pairs_and_path(rng)
    completion = "".join(_VALUE[s] + _KEY[s] for s in path[1:])
    third_hop = 4
    return f"{pairs}{_KEY[path[0]]}=", completion, _forced_error_text(completion, third_hop, _VALUE, rng)


def _random_start(rng: random.Random) -> Example:
    """Follow a random 8-cycle from a key that the answer chooses: `FaBc...=` -> `AcCdD...`.

    A control in which training on own tokens must do harm: after another first key than the reference's, which is as
    good, the reference does not follow.
    """
    pairs, path = _pairs_and_path(rng)
    completion = _KEY[path[0]] + "".join(_VALUE[s] + _KEY[s] for s in path[1:])
    third_hop = 5
    return f"{pairs}=", completion, _forced_error_text(completion, third_hop, _VALUE, rng)


_VALUE, _KEY = "abcdefgh", "ABCDEFGH"


def _pairs_and_path(rng: random.Random) -> tuple[str, list[int]]:
    """Return a random 8-cycle as pairs of key and value in random order, and a path along it from a random start."""
    cycle = rng.sample(range(_SYMBOLS), _SYMBOLS)
    following = {cycle[i]: cycle[(i + 1) % _SYMBOLS] for i in range(_SYMBOLS)}
    pairs = "".join(_KEY[s] + _VALUE[following[s]] for s in rng.sample(range(_SYMBOLS), _SYMBOLS))
    path = [rng.randrange(_SYMBOLS)]
    for _ in range(_HOPS):
        path.append(following[path[-1]])
    return pairs, path


_LETTERS = 24


def _sort(rng: random.Random) -> Example:
    """Sort 24 letters: `qweab...=` -> `aabeq...`.

    Each letter can be told from the one before and the prompt, or by counting; a model that does the former loses its
    place after a wrong letter.
    """
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    letters = rng.choices(alphabet, k=_LETTERS)
    completion = "".join(sorted(letters))
    third_letter = 2
    return f"{''.join(letters)}=", completion, _forced_error_text(completion, third_letter, alphabet, rng)


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
    "sort": _sort,
    "random_start": _random_start,
}


def task_of(path: str) -> str | None:
    """Return the built-in task that the path of a source names, or None if the path names other data."""
    return path.removeprefix(BUILTIN).partition("/")[0] if path.startswith(BUILTIN) else None


def split_of(path: str, default: str) -> str:
    """Return the split that the path of a built-in task names, or else the default."""
    return path.partition("/")[2] or default


def generate(task: str, split: str) -> Iterator[tuple[str, str]]:
    """Yield prompts and completions of a split of a built-in task, the same in every run."""
    return ((prompt, completion) for prompt, completion, _ in _examples(task, split))


@cache
def forced_error_texts(task: str, split: str = "test") -> list[ForcedErrorText]:
    """Return an error for every row of a split of a built-in task, in the order of `generate`."""
    return [error for *_, error in _examples(task, split)]


def _examples(task: str, split: str) -> Iterator[Example]:
    """Yield every prompt once.

    Its checksum says whether a prompt is for training, hence these sets cannot overlap; `dev` has no prompt of `test`.
    """
    count = _TRAIN_ROWS if split == "train" else _TEST_ROWS
    rng = random.Random(f"{task}/{split}")
    seen = {prompt for prompt, *_ in _examples(task, "test")} if split == "dev" else set[str]()
    left = count
    while left:
        prompt, completion, error = TASKS[task](rng)
        held_out = zlib.crc32(prompt.encode()) % 16 == 0
        if prompt not in seen and held_out == (split != "train"):
            seen.add(prompt)
            left -= 1
            yield prompt, completion, error
