"""Check the shape of the code: short functions, no room that swallows the others, and a picture of all rooms.

`make lint` checks that nothing imports upwards.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions
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


def test_a_function_that_waits_for_other_ranks_says_so() -> None:
    """The docstring of the function or of its class has the word "collective". Functions inside it are part of it."""
    waiting = {"all_gather_object", "all_reduce", "barrier", "broadcast_object_list", "check_ranks", "from_rank_0"}
    waiting |= {"gather_object", "GatheredParameters", "max_over_ranks", "raise_on_all_ranks"}

    def silent(node: ast.AST, told: str = "") -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from silent(child, ast.get_docstring(child) or "")
            elif isinstance(child, ast.FunctionDef):
                calls = [call.func for call in ast.walk(child) if isinstance(call, ast.Call)]
                names = {getattr(function, "attr", getattr(function, "id", "")) for function in calls}
                if names & waiting and "collective" not in (told + (ast.get_docstring(child) or "")).lower():
                    yield child.name

    assert {str(file): names for file, text in FILES.items() if (names := [*silent(ast.parse(text))])} == {}


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


def test_every_package_that_the_code_imports_is_a_dependency() -> None:
    """Otherwise a wheel works only where another package happens to bring it. Some imports wait until they are used."""
    imported = {
        name.split(".")[0]
        for text in FILES.values()
        for node in ast.walk(ast.parse(text))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    of_package = packages_distributions()
    needed = {
        of_package[name][0].lower().replace("_", "-")
        for name in imported - set(sys.stdlib_module_names) - {"selfgen_ds"}
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [name for extra in ("wandb", "embeddings") for name in project["optional-dependencies"][extra]]
    declared = {re.split(r"[\[<>=; ]", line)[0].lower() for line in project["dependencies"] + optional}
    assert needed <= declared
