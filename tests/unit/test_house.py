"""The house that a stranger can hold in mind: short functions, and no room that swallows the others.

`make lint` holds the rule that nothing imports upwards.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import selfgen_ds

PACKAGE = Path(selfgen_ds.__file__).parent
FILES = {path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


def test_no_function_is_longer_than_60_lines() -> None:
    """A function counts from its `def` to its last line, docstring included."""
    long = {
        f"{file}: {node.name}": length
        for file, text in FILES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert long == {}


def test_no_room_has_more_than_a_fifth_of_the_lines() -> None:
    """A room is a folder of the package; the files beside the rooms belong to none."""
    rooms = Counter[str]()
    for file, text in FILES.items():
        if len(file.parts) > 1:
            rooms[file.parts[0]] += text.count("\n")
    total = sum(text.count("\n") for text in FILES.values())
    assert {room: lines for room, lines in rooms.items() if lines > total / 5} == {}
