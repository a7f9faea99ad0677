"""`selfgen-ds compare`: several evaluated runs -> a report (HTML, Markdown, JSON) and its figures (PNG).

Runs whose recipes differ only in the seed, the starting model, and the output folder form one group, which is one
column of the table.
"""

from __future__ import annotations

from pathlib import Path

from selfgen_ds.comparison import plots, report
from selfgen_ds.comparison.runs import Group, check_comparable, grouped, load_run
from selfgen_ds.comparison.verdicts import budgets, compared, other_judges
from selfgen_ds.config import CompareOptions
from selfgen_ds.errors import InputError, Problems
from selfgen_ds.files import as_json, make_folder, write_atomically
from selfgen_ds.progress import SECONDS, bar
from selfgen_ds.validation.options import check_compare


def run(options: CompareOptions) -> None:
    """Compare evaluated runs, and write the report.

    Raises:
        InputError: A run is given twice, missing or damaged, or the runs were evaluated on different rows or settings.
    """
    problems = Problems()
    check_compare(problems, options)
    runs = []
    for folder in bar("read", "run", iterable=options.runs, total=len(options.runs), leave=False, delay=SECONDS):
        with problems.collect():
            runs.append(load_run(Path(folder)))
    problems.raise_all()
    groups = grouped(runs)
    check_comparable(groups)
    metrics = metrics_of(groups, options.metrics)
    folder_out = Path(options.output_dir)
    make_folder(folder_out, "--output_dir")
    print(write(groups, metrics, folder_out))
    print(f"written to {folder_out}/comparison.html, comparison.md, comparison.json and comparison.png")


def write(groups: list[Group], metrics: list[str], folder_out: Path) -> str:
    """Write the report of groups of runs; the first is the baseline.

    Returns:
        The report in Markdown.
    """
    rows = compared(groups, metrics)
    figures = plots.figures(groups, rows)
    document = {"baseline": groups[0].name, "budgets": budgets(groups), "runs": report.runs_table(groups), "rows": rows}
    write_atomically(folder_out / "comparison.json", as_json(document))
    table = report.markdown(groups, rows)
    write_atomically(folder_out / "comparison.md", table)
    write_atomically(folder_out / "comparison.html", report.html(groups, rows, figures))
    plots.write_all(folder_out / "comparison.png", f"{report.title_of(groups)}, 95 % intervals", figures)
    return table


def metrics_of(groups: list[Group], asked: list[str]) -> list[str]:
    """Return the metrics to compare: those that were asked for, or all that every group has.

    Raises:
        InputError: A metric that was asked for is missing.
    """
    common = [name for name in groups[0].metrics if all(name in group.metrics for group in groups)]
    if other_judges(groups):
        common = [name for name in common if name != "win_rate"]
    if missing := [name for name in asked if name not in common]:
        raise InputError(
            f"--metrics: not in every evaluation, or not comparable: {', '.join(missing)}; "
            f"there are {', '.join(common)}"
        )
    return asked or common
