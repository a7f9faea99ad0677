"""Write tests/costs.md, the time that every test file takes, from a report of `make test-all`: `make costs`."""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("costs.md")
SLOWEST = 25
HEAD = """\
# What the tests cost

`make test-all` ran the tests, and `make costs` wrote this page; nobody edits it by hand. The seconds of a test include
its fixtures'. Two processes share the unit tests; one runs the tests that start ranks. `make check` runs the tier
`check`, `make test` the tiers `check` and `test`, and `make test-all` all three.
"""


@dataclass(frozen=True)
class Case:
    """One test of a report: its file, its name with its parameters, its tier, and its seconds."""

    file: str
    name: str
    tier: str
    seconds: float


def read(report: Path) -> list[Case]:
    """Return the tests of a JUnit XML file that pytest wrote with `-o junit_family=xunit1`."""
    return [
        Case(
            file=case.attrib["file"],
            name=case.attrib["name"],
            tier=next(p.attrib["value"] for p in case.iter("property") if p.attrib["name"] == "tier"),
            seconds=float(case.attrib["time"]),
        )
        for case in ElementTree.parse(report).iter("testcase")
    ]


def _rows(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table whose first column is text and whose other columns are numbers."""
    rule = ["---", *["---:" for _ in head[1:]]]
    return [f"| {' | '.join(row)} |" for row in [head, rule, *rows]]


def table(cases: list[Case]) -> str:
    """Return the page: seconds by tier, by file (dearest first), and of the dearest tests."""
    tiers: dict[str, list[Case]] = {"check": [], "test": [], "slow": []}
    files: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        tiers[case.tier].append(case)
        files[case.file].append(case)

    def seconds(some: list[Case]) -> str:
        return f"{sum(case.seconds for case in some):.1f}"

    by_tier = [[tier, str(len(some)), seconds(some)] for tier, some in tiers.items()]
    by_file = [
        [file, str(len(some)), seconds(some), *(seconds([c for c in some if c.tier == tier]) for tier in tiers)]
        for file, some in sorted(files.items(), key=lambda entry: -sum(case.seconds for case in entry[1]))
    ]
    dearest = sorted(cases, key=lambda case: -case.seconds)[:SLOWEST]
    tests = [[f"{Path(c.file).stem}: {c.name}", f"{c.seconds:.1f}", c.tier] for c in dearest]
    return "\n".join(
        [
            HEAD,
            *_rows(["tier", "tests", "seconds"], by_tier),
            "",
            *_rows(["file", "tests", "seconds", *tiers], by_file),
            "",
            *_rows(["test", "seconds", "tier"], tests),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="the JUnit XML file of a pytest run")
    TABLE.write_text(table(read(parser.parse_args().report)), encoding="utf-8")


if __name__ == "__main__":
    main()
