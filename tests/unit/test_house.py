"""Check the shape of the code: short functions, no room that swallows the others, and a picture of all rooms.

`make lint` checks that nothing imports upwards.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

import selfgen_ds
from tests.ranks import ROOT

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


def test_the_picture_of_the_house_shows_the_layers_that_lint_checks() -> None:
    """A line of the picture holds the names of rooms, at least two spaces, and what the rooms are for."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    contracts = tools["importlinter"]["contracts"]
    layers = [room for contract in contracts for layer in contract.get("layers", []) for room in layer.split(" | ")]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = re.findall(r"^    (\S.*?)  ", page.split("## The house")[1].split("\n## ")[0], re.MULTILINE)
    assert [room for names in picture for room in re.findall(r"\w+", names)] == layers
