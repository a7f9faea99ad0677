"""The report of a comparison: a page that needs no other file, and the same in Markdown."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment

from selfgen_ds.comparison.plots import Figure, as_data_url
from selfgen_ds.comparison.runs import Group
from selfgen_ds.comparison.verdicts import budgets, conclusions, explained, other_judges, rule
from selfgen_ds.config import default_settings, flat
from selfgen_ds.evaluation.metrics import ANSWER_KINDS, kind_and_metric

Row = dict[str, Any]
_COSTS = {"steps": "steps", "tokens": "tokens", "no_grad_tokens": "tokens without gradients", "flops": "FLOPs"}
_COSTS |= {"seconds": "seconds"}
_COLUMNS = ("run", *_COSTS.values(), "weights", "judge", "settings")


def title_of(groups: list[Group]) -> str:
    """Return the title of a comparison: the rows and the number of them."""
    data = groups[0].settings["data"]
    sources = data if isinstance(data, list) else [data]
    paths = ", ".join(source if isinstance(source, str) else source["path"] for source in sources)
    rows, prompts = groups[0].rows, groups[0].prompts
    of_prompts = f" with {prompts} prompts" if prompts < rows else ""
    return f"{len(groups)} model{'s' * (len(groups) > 1)} on {rows} rows{of_prompts} of {paths}"


def html(groups: list[Group], rows: list[Row], figures: list[Figure]) -> str:
    """Return the report as a page."""
    template = resources.files("selfgen_ds.comparison").joinpath("report.html.jinja").read_text(encoding="utf-8")
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            title=title_of(groups),
            budgets=budgets(groups),
            conclusions=conclusions(rows, groups),
            other_judges=other_judges(groups),
            rule=rule(rows),
            baseline=groups[0].label,
            cut=_cut(groups),
            columns=_COLUMNS,
            runs=runs_table(groups),
            labels=[group.label for group in groups],
            sections=_sections(groups, rows, metrics),
            figures=[{"title": f.title, "caption": f.caption, "url": as_data_url(f)} for f in figures],
            examples=_examples(groups),
            meanings=explained(metrics),
            settings=yaml.safe_dump(groups[0].settings, sort_keys=False),
        )
    )


def markdown(groups: list[Group], rows: list[Row]) -> str:
    """Return the report's words and tables in Markdown."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    lines = [budgets(groups), ""] if budgets(groups) else []
    for conclusion in conclusions(rows, groups):
        lines += [f"{conclusion.subject}:", "", *(f"- {sentence}" for sentence in conclusion.sentences), ""]
    lines += [other_judges(groups), ""] if other_judges(groups) else []
    lines += [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    lines += [f"| {' | '.join(run[name] for name in _COLUMNS)} |" for run in runs_table(groups)]
    lines.append("")
    for section in _sections(groups, rows, metrics):
        lines.append(f"| {section['title']} | " + " | ".join(group.label for group in groups) + " |")
        lines.append("|---|" + "---|" * len(groups))
        for line in section["lines"]:
            lines.append(f"| {line['metric']} | " + " | ".join(cell["text"] for cell in line["cells"]) + " |")
        lines.append("")
    caption = f"{title_of(groups)}; mean [95 % interval over seeds and rows]"
    if len(groups) > 1:
        caption += f"; in parentheses the difference to {groups[0].name}, paired by row"
    lines += [
        f"{caption}. {rule(rows)}" if len(groups) > 1 else f"{caption}.",
        f"Greedy answers that were cut before the model ended them: {_cut(groups)}.",
    ]
    return "\n".join(lines) + "\n"


def _cut(groups: list[Group]) -> str:
    known = [group for group in groups if group.unfinished is not None]
    answers = {group.name: sum(map(len, group.runs)) for group in groups}
    return ", ".join(f"{group.unfinished} of {answers[group.name]} ({group.name})" for group in known) or "not known"


def runs_table(groups: list[Group]) -> list[dict[str, str]]:
    """Return what was run, and what it cost: the cells of a row per group, by column."""
    table = []
    for group, settings in _differing(groups).values():
        cost = {} if group.cost is None else {f.name: getattr(group.cost, f.name) for f in fields(group.cost)}
        forms = {name: ".3g" if name == "flops" else ",.0f" for name in _COSTS}
        of_cost = {c: format(cost[name], forms[name]) if cost else "not known" for name, c in _COSTS.items()}
        judges = ", ".join(map(_judged, filter(None, group.judged))) or "none"
        table.append({"run": group.label, **of_cost, "weights": group.dtype, "judge": judges, "settings": settings})
    return table


def _judged(judged: dict[str, Any]) -> str:
    rate = judged["length_controlled_win_rate"]
    interval = f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
    doubts = f"{judged['unclear']:.0%} of the verdicts unclear, {judged['by_place']:.0%} of the pairs decided by order"
    return f"{judged['judge']} against {judged['against']}: win rate at equal length {interval}; {doubts}"


def _differing(groups: list[Group]) -> dict[str, tuple[Group, str]]:
    """Return, per group, the settings of its recipe that are not the same in all groups, nor the default."""
    recipes = {group.name: flat(group.recipe) if group.recipe else {} for group in groups}
    own = {"seed", "output_dir", "resume", "run_name", "data.date"}
    names = dict.fromkeys(name for recipe in recipes.values() for name in recipe if name not in own)
    varied = [n for n in names if len({repr(recipe.get(n)) for recipe in recipes.values() if recipe}) > 1]
    defaults = default_settings()
    told = {}
    for group in groups:
        recipe = recipes[group.name]
        given = [name for name in varied if recipe.get(name) is not None and recipe[name] != defaults.get(name)]
        text = ", ".join(f"{name} {recipe[name]}" for name in given)
        told[group.name] = (group, text or ("defaults" if recipe else "no recipe"))
    return told


def _sections(groups: list[Group], rows: list[Row], metrics: list[str]) -> list[dict[str, Any]]:
    """Return a table for every kind of answers, with a line per metric and a cell per group."""
    by_name = {(row["run"], row["metric"]): row for row in rows}
    meanings = explained(metrics)
    sections: dict[str, dict[str, Any]] = {}
    for name in metrics:
        kind, _ = kind_and_metric(name)
        title = f"{kind.replace('_', ' ')}: {_of_kind(kind)}" if kind else "Greedy answers and predictions"
        cells = [_cell(by_name[group.name, name]) for group in groups]
        section = sections.setdefault(kind, {"title": title, "lines": []})
        section["lines"].append({"metric": name, "meaning": meanings[name], "cells": cells})
    return list(sections.values())


def _of_kind(kind: str) -> str:
    return next(text for pattern, text in ANSWER_KINDS.items() if re.fullmatch(pattern, kind))


def _cell(row: Row) -> dict[str, str]:
    if not math.isfinite(row["mean"]):
        return {"text": "not finite", "verdict": "worse"}
    text = f"{row['mean']:z.3f} [{row['low']:z.3f}, {row['high']:z.3f}]"
    if row["paired_difference"] == row["paired_low"] == row["paired_high"] == 0:
        text += " (equal on all rows)"
    elif row["paired_difference"] is not None and math.isfinite(row["paired_difference"]):
        text += f" ({row['paired_difference']:+z.3f} [{row['paired_low']:+z.3f}, {row['paired_high']:+z.3f}])"
    verdict = row["verdict"] if row["verdict"] in ("better", "worse", "differs") else ""
    verdict += " single" if verdict and not row["seeds_known"] else ""
    return {"text": text, "verdict": verdict}


def _examples(groups: list[Group]) -> list[dict[str, Any]]:
    """Return the first rows with the answers of every group's first run."""
    return [
        {
            "sample_id": first.sample_id,
            "texts": [
                ("prompt", first.prompt),
                ("reference", first.reference),
                *((group.label, group.runs[0].examples[i].answer) for group in groups),
            ],
        }
        for i, first in enumerate(groups[0].runs[0].examples)
    ]
