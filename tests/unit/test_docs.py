"""Check the pages: their links, paths, settings, commands, quoted log lines, and lengths."""

from __future__ import annotations

import re
import runpy
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from jsonargparse import ArgumentParser

from selfgen_ds import cli
from selfgen_ds.config import LoraConfig, Recipe
from tests.ranks import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FOLDERS = "recipes|ds_configs|selfgen_ds|launch|docs|tests|benchmarks|experiments"
VARYING = r"\.\.\.|[,:;]|rank \d|step-\d+|node\d|\d[\d.]*|'[^']*'|\([^)]*\)|RuntimeError|selfgen_ds/\S*"
"""The parts of a quoted log line that differ from run to run: numbers, names, and values."""
SECTIONS = {name: kind for name, kind in get_type_hints(Recipe).items() if is_dataclass(kind)}
SETTINGS = (
    {field.name for field in fields(Recipe)}
    | {f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in fields(kind)}
    | {f"model.lora.{field.name}" for field in fields(LoraConfig)}
)


def commands(text: str) -> list[list[str]]:
    """Return the words of every command in an indented block, without comments; lines that end with `\\` are joined.

    A line `NAME=value` sets a variable for the lines after it.
    """
    lines = re.findall(r"^ {4,}(\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
    programs = ("deepspeed ", "torchrun ", "mpirun ", "python ", "selfgen-ds ", "launch/", "sbatch ", "make ")
    found, variables = [], {}
    for line in lines:
        if assignment := re.fullmatch(r"([A-Z]+)=(\S+|\".*\")", line):
            variables[assignment[1]] = assignment[2].strip('"')
        elif line.startswith(programs):
            words = re.sub(r"\$([A-Z]+)", lambda match: variables[match[1]], line)
            found.append(shlex.split(words, comments=True))
    return found


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_lead_to_existing_files_and_headings() -> None:
    for page, text in TEXTS.items():
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", text):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in map(slug, headings), f"{page}: {target}#{anchor}"


def test_named_paths_exist() -> None:
    form = rf"(?<![\w/.-])(?:\.\./)?((?:{FOLDERS})/[\w./*-]*[\w*/])"
    named = [(page, path) for page, text in TEXTS.items() for path in re.findall(form, text)]
    assert [(page, path) for page, path in named if not list(ROOT.glob(path))] == []


def test_settings_are_those_of_the_configuration() -> None:
    section = rf"(?:{'|'.join(SECTIONS)})"
    for page, text in TEXTS.items():
        given = re.findall(rf"(?<![\w-])--({section}\.[\w.]+)", text)
        quoted = re.findall(rf"`({section}\.[a-z_.]+)(?=[`:])", text)
        named = {name.removesuffix(".help") for name in [*given, *quoted]}
        assert {
            name for name in named if name not in SECTIONS and not name.endswith((".md", ".py", ".json", ".jsonl"))
        } <= SETTINGS, page


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    return cli._parser()


@pytest.mark.parametrize("page", TEXTS)
def test_commands_are_understood(
    page: str, parser: ArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, recipe in re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```", TEXTS[page], re.MULTILINE | re.DOTALL):
        Path(name).write_text(recipe, encoding="utf-8")
    for words in commands(TEXTS[page]):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE), words
        starts = [number for number, word in enumerate(words) if word in ("selfgen-ds", "selfgen_ds")]
        if starts:
            arguments = words[starts[0] + 1 :]
        elif scripts := [number for number, word in enumerate(words) if word.startswith("launch/")]:
            script = scripts[0]
            options = [word for word in words[script + 1 :] if word not in ("--dry-run", "--pilot")]
            command = "pilot" if "--pilot" in words or "pilot" in words[script] else "train"
            arguments = [command, "--config", *options[not words[script].endswith(".sbatch") :]]
        else:
            continue
        if arguments[0] == "bench" and "--config" not in arguments:
            arguments[1:1] = ["--config", "recipes/bench.yaml"]
        parser.parse_args(arguments)


def test_named_make_targets_exist() -> None:
    named = {target for text in TEXTS.values() for target in re.findall(r"`make ([\w-]+)`", text)}
    assert {"check", "test", "test-all"} <= named
    assert [target for target in named if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)] == []


def test_pages_are_short_and_in_the_table_of_the_readme() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150
    for page, text in TEXTS.items():
        assert page == "README.md" or f"]({page})" in TEXTS["README.md"], page
        by_hand = re.sub(r"<!-- Written by .*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
        assert page == "docs/settings.md" or (len(by_hand.splitlines()) <= 150 and len(by_hand.split()) <= 1250), page


def test_the_page_of_the_settings_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_settings.py"))
    assert TEXTS["docs/settings.md"] == script["page"](), "run `python docs/make_settings.py`"


def test_the_lines_that_are_explained_are_those_that_the_code_writes() -> None:
    files = [*(ROOT / "selfgen_ds").rglob("*.py"), *(ROOT / "launch").glob("*")]
    source = "".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
    source = re.sub(r"\"\s*\n\s*f?\"", "", source)  # one literal on two lines
    table = re.findall(r"^\| (`.*?) \|", TEXTS["docs/troubleshooting.md"].split("## Timeouts")[0], re.MULTILINE)
    lines = [line for cell in table for line in re.findall(r"`([^`]+)`", cell)]
    assert len(lines) > 15
    for line in lines:
        for part in map(str.strip, re.split(VARYING, line)):
            assert len(part) < 5 or part in source, f"{line!r}: {part!r}"
