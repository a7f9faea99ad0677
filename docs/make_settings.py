"""Write `docs/settings.md` from the dataclasses of `selfgen_ds/config.py`: `python docs/make_settings.py`.

Names, types and defaults are those of the fields; the meaning is the field's docstring. Which method reads a setting of
`selfgen` is what the method's class says.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from docstring_parser import parse_from_object

from selfgen_ds import config
from selfgen_ds.methods import METHODS

PAGE = Path(__file__).with_name("settings.md")
_INTRODUCTION = """\
# Every setting

<!-- Written by `python docs/make_settings.py` from `selfgen_ds/config.py`: change it there. -->

This page is for you if you look for a setting, its type or its default. A setting `section.name` is `name:` below
`section:` in the recipe, and `--section.name VALUE` on the command line. `selfgen-ds train --help` shows the same text.
"""
_CLOSING = """\

`tests/unit/test_docs.py` checks that this page is what the script writes.
"""
_SECTIONS: list[tuple[str, type, str]] = [
    ("Top level", config.Recipe, ""),
    ("model", config.ModelConfig, "model."),
    ("model.lora", config.LoraConfig, "model.lora."),
    ("data", config.DataConfig, "data."),
    ("A source of `data.train` or `data.eval`", config.Source, ""),
    ("selfgen", config.SelfgenConfig, "selfgen."),
    ("optim", config.OptimConfig, "optim."),
    ("train", config.TrainConfig, "train."),
    ("checkpoint", config.CheckpointConfig, "checkpoint."),
    ("eval", config.EvalConfig, "eval."),
    ("inspect", config.InspectOptions, "--"),
    ("bench", config.BenchOptions, "--"),
    ("probe", config.ProbeOptions, "--"),
    ("pilot", config.PilotOptions, "--"),
    ("evaluate", config.EvaluateOptions, "--"),
    ("generate", config.GenerateOptions, "--"),
    ("compare", config.CompareOptions, ""),
    ("export", config.ExportOptions, "--"),
]
"""Heading, dataclass and prefix of its settings, in the order of the page."""


def page() -> str:
    """Return the text of `docs/settings.md`."""
    return _INTRODUCTION + "".join(_section(*section) for section in _SECTIONS) + _CLOSING


def _section(heading: str, of: type, prefix: str) -> str:
    read_by = of is config.SelfgenConfig
    documentation = parse_from_object(of)
    meanings = {parameter.arg_name: parameter.description or "" for parameter in documentation.params}
    rows = ["| setting | type | default |" + (" read by |" if read_by else "") + " meaning |"]
    rows.append("|---" * (4 + read_by) + "|")
    for field in fields(of):
        if field.name not in meanings:
            continue  # a section of its own
        cells = [f"`{prefix}{field.name}`", _type(str(field.type)), _default(field)]
        cells += [_readers(field.name)] if read_by else []
        rows.append("| " + " | ".join([*cells, _escaped(" ".join(meanings[field.name].split()))]) + " |")
    return f"\n## {heading}\n\n{documentation.description}\n\n" + "\n".join(rows) + "\n"


def _type(annotation: str) -> str:
    """The alternatives of an annotation, such as `"even"`, `"late"` for a literal of these; `None` is the default's."""
    annotation = annotation.replace("Sources", "str | Source | list[str | Source]")
    annotation = re.sub(r"Literal\[([^]]*)\]", lambda values: values[1].replace(", ", " | "), annotation)
    alternatives = [part for part in re.split(r" \| (?![^\[]*\])", annotation) if part != "None"]
    return ", ".join(f"`{part}`" for part in alternatives).replace("|", r"\|")


def _default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING:
        return "" if is_dataclass(field.default_factory) else f"`{field.default_factory()}`"
    if field.default is MISSING:
        return "required"
    if field.default is None:
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _readers(name: str) -> str:
    readers = [f"`{method}`" for method, kind in METHODS.items() if name in kind.settings]
    return "all" if name == "method" else ", ".join(readers)


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
