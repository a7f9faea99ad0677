"""The report of a pilot: one verdict per method and metric, what it cost, and what the whole run would cost."""

from __future__ import annotations

import math
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.axes import Axes

from selfgen_ds import compare
from selfgen_ds.comparison.intervals import LEAST_ROWS
from selfgen_ds.comparison.plots import Figure, as_data_url
from selfgen_ds.comparison.runs import Group, check_comparable
from selfgen_ds.config import PilotOptions, Recipe
from selfgen_ds.evaluation.metrics import meaning, metric_of
from selfgen_ds.files import as_json, write_atomically
from selfgen_ds.pilot.planning import LEAST_COST, Plan
from selfgen_ds.pilot.rows import PilotRows, kinds
from selfgen_ds.pilot.verdicts import LEVEL, chosen_metrics, verdicts, verdicts_by_kind

Row = dict[str, Any]
_MANY_CUT = 0.1
"""Share of cut greedy answers from which the report tells of them."""
_COLORS = {"helps": "#2a8f4f", "harms": "#c0392b", "no difference shown": "#777777"}


def write(
    groups: list[Group],
    settings: list[dict[str, Any]],
    plan: Plan,
    rows: PilotRows,
    recipe: Recipe,
    options: PilotOptions,
) -> None:
    """Write `pilot.json`, `pilot.md`, `pilot.html` and the comparison of all metrics, and print the verdicts.

    Args:
        groups: The runs of every arm, sft first.
        settings: The settings of each arm.

    Raises:
        InputError: A metric was asked for that the evaluations do not have.
    """
    folder = Path(recipe.output_dir)
    check_comparable(groups)
    every = compare.metrics_of(groups, [])
    metrics = compare.metrics_of(groups, options.metrics) if options.metrics else chosen_metrics(groups)
    told = verdicts(groups, metrics)
    by_kind: list[Row] = []
    left_out: list[str] = []
    if options.group_by is not None:
        of_rows = kinds(options.group_by, rows)
        evaluated = [of_rows[number] for number in groups[0].runs[0].sample_ids]
        by_kind = verdicts_by_kind(groups, metrics, evaluated)
        left_out = [kind for kind in dict.fromkeys(evaluated) if evaluated.count(kind) < LEAST_ROWS]
    document: Row = {
        "baseline": "sft",
        "rows": rows.trained,
        "held_out": rows.evaluated,
        "whole": rows.whole,
        "seeds": groups[0].seeds,
        "methods": {group.method: own for group, own in zip(groups, settings, strict=True)},
        "verdicts": told,
        "by_kind": by_kind,
        "kinds_left_out": left_out,
        "cost": costs(groups, plan, rows, recipe),
    }
    document["notes"] = notes(groups, document["cost"])
    write_atomically(folder / "pilot.json", as_json(document))
    compare.write(groups, every, folder)
    text = markdown(document, options.group_by)
    write_atomically(folder / "pilot.md", text)
    write_atomically(folder / "pilot.html", html(document, options.group_by))
    print(text)
    print(f"written to {folder}/pilot.html, pilot.md and pilot.json; all metrics: {folder}/comparison.html")


def costs(groups: list[Group], plan: Plan, rows: PilotRows, recipe: Recipe) -> Row:
    """Return what the runs have cost, and what the whole run would cost on as many ranks.

    The whole run takes the steps of the recipe over all training rows, each as long as in the pilot.
    """
    share = plan.rows_per_epoch / rows.trained  # rows may be packed or refused
    whole_steps = recipe.train.max_steps or math.ceil(
        (recipe.train.epochs or 1) * rows.whole * share / plan.rows_per_step
    )
    cost: Row = {"seconds": 0.0, "runs": {}, "whole_steps": whole_steps}
    for group in groups:
        assert group.cost is not None  # `train` has written metrics.jsonl
        per_step = group.cost.seconds / group.cost.steps
        cost["seconds"] += group.cost.seconds * len(group.runs)
        cost["runs"][group.method] = {
            **asdict(group.cost),
            "relative_flops": group.cost.flops / (cost["runs"]["sft"]["flops"] if cost["runs"] else group.cost.flops),
            "whole_run_hours": whole_steps * per_step / 3600,
        }
    return cost


def notes(groups: list[Group], cost: Row) -> list[str]:
    """Return what makes the verdicts say less: answers that were cut, and budgets that were not used up."""
    told = []
    for group in groups:
        answers = sum(map(len, group.runs))
        if group.unfinished is not None and group.unfinished >= _MANY_CUT * answers:
            told.append(
                f"{group.method}: {group.unfinished} of {answers} greedy answers were cut before the model ended them. "
                "A model that cannot end its answers has hardly learned its task, or needs a larger `max_new_tokens` "
                "(`--evaluation`): the verdicts may be others after longer training."
            )
    for name, run in cost["runs"].items():
        if run["relative_flops"] < LEAST_COST:
            share = f"{run['relative_flops']:.2f} of the operations of sft"
            told.append(f"{name}: its runs took {share}; with one step or round more, they would have cost more.")
    return told


def markdown(document: Row, group_by: str | None) -> str:
    """Return the verdicts and costs in Markdown."""
    told = [*sentences(document["verdicts"], document["methods"]), *document["notes"]]
    lines = [_summary(document), "", *(f"- {sentence}" for sentence in told), ""]
    lines += _table(_VERDICT_COLUMNS, [_verdict_cells(row) for row in document["verdicts"]])
    lines += ["", RULE, "", *(f"- {line}" for line in _meanings(document["verdicts"]))]
    if document["by_kind"]:
        cells = [[str(row["kind"]), *_verdict_cells(row)[:_OF_KIND]] for row in document["by_kind"]]
        lines += ["", *_table((str(group_by), *_VERDICT_COLUMNS[:_OF_KIND]), cells)]
    if document["kinds_left_out"]:
        lines += ["", _left_out(document["kinds_left_out"])]
    lines += ["", *_table(_COST_COLUMNS, _cost_cells(document["cost"])), "", _whole_run(document["cost"])]
    return "\n".join(lines) + "\n"


_VERDICT_COLUMNS = (
    *("method", "metric", "verdict", "difference to sft [95 %]", "p, corrected", "sft"),
    "to tell a difference as large",
)
_OF_KIND = 5
"""Columns of a kind of rows."""
_COST_COLUMNS = ("method", "steps of a run", "operations of a run", "time of a run", "time of the whole run")
RULE = (
    f"A method helps or harms in a metric if p, corrected for the number of verdicts (Holm), is below {LEVEL:.0%}. An "
    "interval is that of one difference alone: among many, some do not contain zero by chance. Runs are paired by seed "
    "and row; of a single seed, nothing is shown. comparison.html tests all metrics, and is therefore less often sure."
)


def _meanings(rows: list[Row]) -> list[str]:
    """Return what the metrics of the verdicts mean, a line each."""
    lines = []
    for name in dict.fromkeys(row["metric"] for row in rows):
        better = metric_of(name).better
        lines.append(f"{name}: {meaning(name)}{'; lower is better' * (better == 'lower')}")
    return lines


def _whole_run(cost: Row) -> str:
    return (
        "Times are those of steps and rounds, without evaluations. The whole run takes the recipe's epochs or steps "
        f"over all training rows, {cost['whole_steps']:,} steps with every method, on as many ranks as a run here."
    )


def sentences(rows: list[Row], settings: dict[str, dict[str, Any]]) -> list[str]:
    """Return what the verdicts say of every method, in words.

    Args:
        settings: Name of a method -> its settings.
    """
    told = []
    for method in dict.fromkeys(row["method"] for row in rows):
        parts = []
        for verdict in _COLORS:
            if names := [row["metric"] for row in rows if row["method"] == method and row["verdict"] == verdict]:
                parts.append(f"{verdict} in {', '.join(names)}")
        own = {key.removeprefix("selfgen."): value for key, value in settings[method].items()}
        described = ", ".join(f"{key} {value}" for key, value in own.items() if key != "method")
        told.append(f"{method}{f' ({described})' * bool(described)}: {'; '.join(parts)}.")
    return told


def _left_out(kinds: list[str]) -> str:
    return f"{len(kinds)} kinds have fewer than {LEAST_ROWS} held-out rows, and no verdict: {', '.join(kinds[:10])}."


def _summary(document: Row) -> str:
    seeds = len(document["seeds"])
    return (
        f"{document['rows']} of {document['whole']} training rows, {document['held_out']} rows held out, "
        f"{seeds} seed{'s' * (seeds > 1)} of each method."
    )


def _verdict_cells(row: Row) -> list[str]:
    interval = f"{row['difference']:+z.3f} [{row['low']:+z.3f}, {row['high']:+z.3f}]"
    p, baseline = f"{row['p_corrected']:.3f}", f"{row['baseline']:.3f}"
    return [row["method"], row["metric"], row["verdict"], interval, p, baseline, needed(row)]


def needed(row: Row) -> str:
    """Return how many rows or seeds could tell a difference as large as that of a row of verdicts, in words."""
    if not math.isfinite(row["difference"]):
        return "not finite"
    if row["verdict"] != "no difference shown":
        return ""
    if row["difference"] == 0:
        return "there is none"
    parts = []
    if row["rows_needed"] is not None:
        parts.append(f"{row['rows_needed']:,} held-out rows")
    if row["seeds_needed"] is not None:
        parts.append(f"{row['seeds_needed']} seeds")
    if not parts and row["rows_and_seeds_needed"] is not None:
        rows, seeds = row["rows_and_seeds_needed"]
        parts.append(f"{rows:,} held-out rows and {seeds} seeds")
    return " or ".join(parts) or ("more seeds" if row["seeds"] == 1 else "far more rows and seeds")


def _cost_cells(cost: Row) -> list[list[str]]:
    return [
        [
            name,
            f"{run['steps']:.0f}",
            f"{run['relative_flops']:.2f} of sft",
            _duration(run["seconds"]),
            _duration(3600 * run["whole_run_hours"]),
        ]
        for name, run in cost["runs"].items()
    ]


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


def _table(columns: tuple[str, ...], cells: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in cells]


def html(document: Row, group_by: str | None) -> str:
    """Return the report as a page that needs no other file."""
    template = resources.files("selfgen_ds.pilot").joinpath("pilot.html.jinja").read_text(encoding="utf-8")
    shown = Figure(
        title="Differences to sft",
        caption="95 % intervals; to the right the method is better. Losses have their own axis, and other metrics are "
        "divided by the width of their scale (1, or 100).",
        draw=lambda axes: plot(axes, document["verdicts"]),
    )
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            summary=_summary(document),
            sentences=[*sentences(document["verdicts"], document["methods"]), *document["notes"]],
            rule=RULE,
            meanings=_meanings(document["verdicts"]),
            whole_run=_whole_run(document["cost"]),
            columns=_VERDICT_COLUMNS,
            verdicts=[(row["verdict"], _verdict_cells(row)) for row in document["verdicts"]],
            group_by=group_by,
            left_out=_left_out(document["kinds_left_out"]) if document["kinds_left_out"] else "",
            kind_columns=[group_by, *_VERDICT_COLUMNS[:_OF_KIND]],
            by_kind=[
                (row["verdict"], [str(row["kind"]), *_verdict_cells(row)[:_OF_KIND]]) for row in document["by_kind"]
            ],
            cost_columns=_COST_COLUMNS,
            costs=_cost_cells(document["cost"]),
            figure=as_data_url(shown),
            caption=shown.caption,
        )
    )


def plot(axes: Axes, rows: list[Row]) -> None:
    """Draw the interval of every verdict; metrics without a largest value, such as losses, have an axis of their own.

    A metric of which lower values are better is turned round.
    """
    other = axes.twiny()
    for place, row in enumerate(reversed(rows)):
        metric = metric_of(row["metric"])
        sign = (-1 if metric.better == "lower" else 1) / (metric.scale or 1)
        low, value, high = sorted((sign * row["low"], sign * row["difference"], sign * row["high"]))
        color, on = _COLORS[row["verdict"]], axes if metric.scale else other
        on.plot([low, high], [place, place], color=color)
        on.plot([value], [place], "o" if metric.scale else "D", color=color)
    for each in (axes, other):
        most = max((abs(limit) for limit in each.get_xlim()), default=1.0)
        each.set_xlim(-most, most)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['method']}: {row['metric']}" for row in reversed(rows)], fontsize=8)
    axes.set_xlabel("difference to sft, in shares of the scale (right: better)")
    if any(not metric_of(row["metric"]).scale for row in rows):
        other.set_xlabel("◆ metrics without a scale, such as losses in nats")
    else:
        other.set_xticks([])
