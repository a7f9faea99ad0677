"""How far an answer of `random_start` follows from its own letters."""

from __future__ import annotations

import pytest

from experiments.following import follows
from selfgen_ds.data.tasks import generate


def test_references_follow_from_whichever_letter_they_start_with() -> None:
    for _, (prompt, completion) in zip(range(20), generate("random_start", "dev"), strict=False):
        assert follows(prompt, completion, completion) == 1.0
        start = next(key for key in "ABCDEFGH" if key != completion[0])
        assert follows(prompt, start + completion[1:], completion) == pytest.approx(11 / 12)


def test_letters_are_right_or_wrong_given_those_before_them() -> None:
    assert follows("AbBcCa=", "AbBcC", "CaAbB") == 1.0
    assert follows("AbBcCa=", "AcCaA", "CaAbB") == 3 / 4
    assert follows("AbBcCa=", "Ab", "CaAbB") == 1 / 4
    assert follows("AbBcCa=", "", "CaAbB") == 0.0
