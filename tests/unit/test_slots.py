"""Which slots of a restaurant's description count as realized."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from experiments.slots import realized_slots
from tests.ranks import SHARED

MEANING = "name[Blue Spice], eatType[coffee shop], priceRange[less than £20], area[city centre], familyFriendly[no]"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Blue Spice is a cheap café in the centre of the city, not for families.", 1.0),
        ("BLUE SPICE is a coffee shop for under £20 downtown. Children are not welcome.", 1.0),
        ("Blue Spice is a coffee shop in the city centre.", 3 / 5),
        ("The Punter is by the river.", 0.0),
        ("", 0.0),
    ],
)
def test_values_and_their_usual_wordings_count(answer: str, expected: float) -> None:
    assert realized_slots(MEANING, answer, "") == pytest.approx(expected)


def test_the_references_of_e2e_realize_nearly_all_of_their_slots() -> None:
    path = SHARED / "data" / "e2e" / "devset.csv"
    if not Path(path).exists():
        pytest.skip(f"{path} is absent")
    with open(path, encoding="utf-8", newline="") as file:
        shares = [realized_slots(row["mr"], row["ref"], "") for row in csv.DictReader(file)]
    assert sum(shares) / len(shares) > 0.93
