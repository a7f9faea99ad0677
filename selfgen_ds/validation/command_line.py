"""Find everything that is wrong with a command line, and with the recipe file that it names.

jsonargparse parses both, but stops at its first problem, and names neither the file of a setting nor a similar setting.
When it has refused a command line, `problems` looks at all settings again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from selfgen_ds import packaged
from selfgen_ds.errors import InputError, Problems


def problems(arguments: list[str], settings: type, others: dict[str, Any]) -> list[str]:
    """Return every unknown, missing, and mistyped setting, one line each; none if something else is wrong.

    Args:
        arguments: The command line after the sub-command.
        settings: The dataclass that the command line and the recipe file fill.
        others: The sub-command's other options, and their types.
    """
    options = dict(_options(arguments))
    known, required = _known(settings)
    found = Problems()
    in_file: list[tuple[str, Any]] = []
    recipe = options.pop("config", None)
    if recipe is not None:
        with found.collect():
            in_file = list(_dotted(_read(recipe), known))
    given = [*in_file, *options.items()]
    found.add(*(f"{recipe}: {line}" for line in _wrong(in_file, known)))
    as_options = {f"--{name}": hint for name, hint in (known | others).items()}
    found.add(*_wrong([(f"--{name}", text) for name, text in options.items()], as_options))
    if recipe is None or in_file:  # a file that cannot be read may have the missing settings
        where = " in the recipe (--config) or" if settings.__name__ == "Recipe" else ""
        missing = [setting for setting in required if not any(_within(name, setting) for name, _ in given)]
        found.add(*(f"{setting}: missing; give it{where} as --{setting}" for setting in missing))
    return found.lines


def _options(arguments: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the text of every option, which stands behind `=` or is the next argument."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument.startswith("--"):
            name, equals, text = argument.removeprefix("--").partition("=")
            yield name, text if equals else "" if following.startswith("--") else following


def _known(settings: type, prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return the type of every setting by its name, such as `train.max_steps`, and the names of the required ones."""
    known: dict[str, Any] = {}
    required = []
    hints = get_type_hints(settings)
    for field in fields(settings):
        name, hint = prefix + field.name, hints[field.name]
        if not is_dataclass(hint):
            known[name] = hint
            if field.default is MISSING and field.default_factory is MISSING:
                required.append(name)
        for section in (hint, *get_args(hint)):  # a setting may be a section or something else
            if isinstance(section, type) and is_dataclass(section):
                of_section, needed = _known(section, f"{name}.")
                known |= of_section
                required += needed if section is hint else []
    return known, required


def _read(recipe: str) -> dict[str, Any]:
    """Return the content of a recipe file.

    Raises:
        InputError: There is no such file, or it is not a YAML mapping.
    """
    path = packaged.find(recipe, "recipes")
    if not path.is_file():
        raise InputError(f"--config: no file {recipe!r}; the packaged recipes are {packaged.names('recipes')}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config: {recipe}: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise InputError(f"--config: {recipe}{line}: malformed YAML: {error.problem}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config: {recipe}: expected settings by name, got {type(content).__name__}")
    return content


def _dotted(content: dict[str, Any], known: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every setting of a recipe file; sources in a list share their names."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        sections = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, dict)]
        if not sections or not any(_within(setting, name) and setting != name for setting in known):
            yield name, value
        else:
            for section in sections:
                yield from _dotted(section, known, f"{name}.")


def _within(name: str, section: str) -> bool:
    return f"{name}.".startswith(f"{section}.")


def _wrong(given: Iterable[tuple[str, Any]], known: dict[str, Any]) -> Iterator[str]:
    """Yield a line for every given setting that does not exist or does not have its type."""
    for name, value in given:
        if name in known:
            if not _fits(known[name], value):
                yield f"{name}: expected {_words(known[name])}, got {value!r}"
        elif any(_within(setting, name) for setting in known):
            yield f"{name}: expected settings by name, got {value!r}"
        else:
            last = name.rpartition(".")[2]
            similar = [s for s in known if s.rpartition(".")[2] == last] or get_close_matches(name, known, n=1)
            yield f"{name}: no such setting" + (f"; did you mean {similar[0]}?" if similar else "")


def _fits(hint: Any, value: Any) -> bool:
    """Return whether a value has a type; an option's text may also have it as YAML."""
    values = [value]
    if isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError):
            values.append(yaml.safe_load(value))
    for form in values:
        try:
            TypeAdapter(hint).validate_python(form)
        except ValidationError:
            continue
        return True
    return False


def _words(hint: Any) -> str:
    """Return a type in a user's words."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (list, tuple):
        return "a list"
    if get_args(hint) and get_origin(hint) is not dict:
        return " or ".join(_words(form) for form in get_args(hint) if form is not type(None))
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(hint, "settings by name")
