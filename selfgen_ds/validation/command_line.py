"""Find everything that is wrong with a command line, and with the recipe file that it names.

jsonargparse parses both, but stops at its first problem, and names neither the file of a setting nor a similar setting.
When it has refused a command line, `check_command_line` looks at all settings again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from selfgen_ds import packaged
from selfgen_ds.config import Recipe
from selfgen_ds.errors import InputError, Problems
from selfgen_ds.files import refusal

_OF_THE_PARSER = ("help", "print_config")


def check_command_line(problems: Problems, arguments: list[str], settings: tuple[type, ...]) -> None:
    """Check that every given setting exists and has its type, and that no setting is missing.

    Args:
        arguments: The command line after the sub-command.
        settings: The dataclasses whose fields are the sub-command's options.
    """
    options, stray = _options(arguments)
    without = [name for name, text in options.items() if text is None and name not in _OF_THE_PARSER]
    problems.add(*(f"--{name}: expected a value" for name in without))
    known: dict[str, Any] = {}
    required: list[str] = []
    for part in settings:
        of_part, needed = _known(part)
        known |= of_part
        required += needed
    in_file: list[tuple[str, Any]] | None = None if options.get("config", "") is None else []
    recipe = options.pop("config", None)
    if recipe is not None:
        in_file = None
        with problems.collect():
            in_file = list(_dotted(_read(recipe), known))
    values = {name: _value(text) for name, text in options.items() if text is not None}
    in_options = list(_dotted(values, known))
    problems.add(*(f"{recipe}: {line}" for line in _wrong(in_file or [], known)))
    problems.add(*_wrong(in_options, known, "--"))
    has_recipe = issubclass(settings[0], Recipe)
    option = "--config" if has_recipe else f"--{required[0]}"
    problems.add(*(f"{text}: expected an option, such as {option} {text}" for text in stray))
    if not stray and in_file is not None:  # otherwise the file, once it can be read, may have the missing settings
        where = " in the recipe (--config) or" if has_recipe else ""
        names = [*options, *(name for name, _ in (*in_file, *in_options))]
        missing = [setting for setting in required if not any(_within(name, setting) for name in names)]
        problems.add(*(f"{setting}: missing; give it{where} as --{setting}" for setting in missing))


def check_options(problems: Problems, arguments: list[str], known: dict[str, Any], required: list[str]) -> None:
    """Check the options of a sub-command that takes other arguments beside them.

    Args:
        arguments: The command line after the sub-command.
        known: Option -> its type.
        required: Options that must be given.
    """
    options, _ = _options(arguments)
    problems.add(*_wrong([(n, text) for n, text in options.items() if text is not None or n not in known], known, "--"))
    problems.add(*(f"--{name}: missing" for name in required if name not in options))
    problems.add(*(f"--{name}: expected a value" for name in known if options.get(name, "") is None))


def _options(arguments: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """Return the text of every option by its name, None where it is missing, and arguments that belong to no option."""
    options: dict[str, str | None] = {}
    stray: list[str] = []
    waiting: str | None = None  # the option whose text comes next
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, text = argument.removeprefix("--").partition("=")
            options[name.removesuffix("+")] = text if equals else None  # `+` appends to a list
            waiting = None if equals else name.removesuffix("+")
        elif waiting is not None:
            options[waiting], waiting = argument, None
        else:
            stray.append(argument)
    return options, stray


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
    except UnicodeDecodeError as error:
        raise InputError(f"--config: {recipe}: expected UTF-8, got another encoding at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"--config: {refusal(error) or error}") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise InputError(f"--config: {recipe}{line}: malformed YAML: {error.problem}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise InputError(f"--config: {recipe}: malformed YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config: {recipe}: expected settings by name, got {type(content).__name__}")
    return content


def _value(text: str) -> Any:
    """Return the settings that an option's text gives as a YAML mapping or list, or else the text itself."""
    with suppress(yaml.YAMLError):
        if isinstance(value := yaml.safe_load(text), dict | list):
            return value
    return text


def _dotted(content: dict[str, Any], known: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every setting; sources in a list share their names."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        parts = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, dict)]
        has_parts = any(_within(setting, name) and setting != name for setting in known)
        if has_parts:
            for part in parts:
                yield from _dotted(part, known, f"{name}.")
        if name in known or not (has_parts and parts):
            yield name, value


def _within(name: str, section: str) -> bool:
    """Return whether a name is the section's own or that of a setting in it."""
    return f"{name}.".startswith(f"{section}.")


def _wrong(given: Iterable[tuple[str, Any]], known: dict[str, Any], dashes: str = "") -> list[str]:
    """Return a line for every given setting that does not exist or does not have its type.

    Args:
        dashes: What stands before the name of an option.
    """
    found: list[str] = []
    for name, value in given:
        if name in known:
            # A wrong part of a setting has its own line already.
            if not any(line.startswith(f"{dashes}{name}.") for line in found):
                found += [f"{dashes}{name}{problem}" for problem in _mismatch(known[name], value)]
        elif any(_within(setting, name) for setting in known):
            if not dashes:  # an option may name a file with the settings of a section
                found.append(f"{name}: expected settings by name, got {value!r}")
        elif not _is_free(name, known):
            meant = _nearest(name, known)
            found.append(f"{dashes}{name}: no such setting" + (f"; did you mean {dashes}{meant}?" if meant else ""))
    return found


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the setting that a wrong name probably means: by its last part, its initials (`lr`), or its letters."""
    section, _, last = name.rpartition(".")
    same_part = [s for s in known if s.rpartition(".")[2] == last]
    initials = [s for s in known if "".join(word[:1] for word in s.rpartition(".")[2].split("_")) == last]
    initials.sort(key=lambda setting: setting.rpartition(".")[0] != section)
    candidates = list(known) if section else [*dict.fromkeys(setting.split(".")[0] for setting in known), *known]
    return next(iter([*same_part, *initials, *get_close_matches(name, candidates, n=1)]), None)


def _is_free(name: str, known: dict[str, Any]) -> bool:
    """Return whether a name that is no setting may be given: the parser's own option, or a key that is not checked."""
    open_settings = [
        s for s, hint in known.items() if any(get_origin(form) is dict for form in (hint, *get_args(hint)))
    ]
    return name.rpartition(".")[2] in _OF_THE_PARSER or any(_within(name, setting) for setting in open_settings)


def _mismatch(hint: Any, value: Any) -> list[str]:
    """Return what is wrong with a value for a type, to follow the setting's name; nothing if the value fits."""
    forms = [value]
    if isinstance(value, str):  # a text fits too if it is the YAML of a value of the type
        with suppress(yaml.YAMLError):
            forms.append(yaml.safe_load(value))
        with suppress(ValueError):
            forms.append(float(value))  # YAML 1.1 takes 1e-4 for a text
    for form in forms:
        try:
            TypeAdapter(hint).validate_json(json.dumps(form, default=str), strict=True)
        except ValidationError as error:
            missing = [str(e["loc"][-1]) for e in error.errors() if e["type"] == "missing"]
        else:
            return []
    if isinstance(value, dict) and missing:
        return [f".{key}: missing" for key in missing]
    return [f": expected {_describe(hint)}, got {value!r}"]


def _describe(hint: Any) -> str:
    """Return a type in a user's words."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (list, tuple):
        (form,) = get_args(hint)[:1]
        words = {str: " of texts", int: " of whole numbers", float: " of numbers"}
        return "a list" + (f" of {_describe(form)}" if get_origin(form) is Literal else words.get(form, ""))
    if get_args(hint) and get_origin(hint) is not dict:
        return " or ".join(_describe(form) for form in get_args(hint) if form is not type(None))
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(hint, "settings by name")
