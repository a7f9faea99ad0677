"""Slots of a description of a restaurant (E2E, Novikova et al. 2017): how many of them its text realizes.

A slot counts as realized if the text has its value, or a usual wording of it, in any case. What the text tells beyond
the meaning representation is not counted.
"""

from __future__ import annotations

import re

_SLOT = re.compile(r"(\w[\w ]*)\[([^\]]*)\]")
_WORDINGS = {
    ("area", "city centre"): r"city cent|cent(er|re) of|downtown",
    ("area", "riverside"): r"river|waterside",
    ("priceRange", "cheap"): r"cheap|inexpensive|low|affordable|budget",
    ("priceRange", "less than £20"): r"20|cheap|inexpensive|low|affordable",
    ("priceRange", "moderate"): r"moderate|mid|average|reasonabl|medium",
    ("priceRange", "£20-25"): r"20|25|moderate|mid|average|medium",
    ("priceRange", "high"): r"high|expensive|pricey|upscale",
    ("priceRange", "more than £30"): r"30|high|expensive|pricey",
    ("customer rating", "low"): r"low|poor|bad|1|one",
    ("customer rating", "1 out of 5"): r"1|one|low|poor|bad",
    ("customer rating", "average"): r"average|decent|3|three|medium",
    ("customer rating", "3 out of 5"): r"3|three|average|decent|medium",
    ("customer rating", "high"): r"high|excellent|great|5|five|well|good",
    ("customer rating", "5 out of 5"): r"5|five|high|excellent|great",
    ("food", "English"): r"english|british",
    ("food", "Fast food"): r"fast",
    ("food", "Japanese"): r"japan|sushi",
    ("food", "Italian"): r"ital|pasta",
    ("food", "French"): r"french|france",
    ("food", "Indian"): r"india",
    ("food", "Chinese"): r"chin",
    ("eatType", "pub"): r"\bpub|\bbar\b",
    ("eatType", "coffee shop"): r"coffee|caf",
    ("eatType", "restaurant"): r"restaurant|place|establishment",
}
_FAMILY = re.compile(r"famil|child|kid|adult")


def realized_slots(prompt: str, answer: str, reference: str) -> float:
    """Return the share of the slots of a meaning representation that an answer realizes; 1 minus the slot errors.

    Args:
        prompt: Text with the meaning representation, such as `name[Alimentum], area[riverside]`.
        answer: The description.
        reference: Not read.
    """
    slots = _SLOT.findall(prompt)
    return sum(_realized(slot, value, answer.lower()) for slot, value in slots) / max(1, len(slots))


def _realized(slot: str, value: str, text: str) -> bool:
    slot = slot.strip()
    if slot == "familyFriendly":
        return bool(_FAMILY.search(text))
    pattern = _WORDINGS.get((slot, value), re.escape(value.lower()))
    return bool(re.search(pattern, text))
