"""How fast rounds are drawn, compared with `generate()` of transformers, as `selfgen-ds bench` measures it."""

from __future__ import annotations

from gpu_checks.benches import run_bench
from gpu_checks.rows import Report

_TO_GENERATE = {
    "bash, p 0.25, 1 pass": (2.0, 1000.0),
    "bash, p 0.25, exact": (0.7, 10.0),
    "rac, free-running": (0.8, 1.2),
}
"""Way to draw -> expected tokens per second with gathered weights, divided by those of `generate()`."""


def check(report: Report) -> None:
    """Report the rate of every way to draw a round, with gathered and with sharded weights."""
    for row in run_bench(report, "rollouts", report.sizes.rollouts)["drawing"]:
        name, fits = row["draws"], row["weights_fit_gathered"]
        report.result(f"{name}: the weights fit gathered", "True", str(fits), fits)
        rates, ratios = row["tokens_per_second"], row["ratio_to_generate"]
        report.figure(f"{name}: gathered", rates["gathered"], "tokens per second")
        expected = _TO_GENERATE[name]
        report.figure(f"{name}: gathered, divided by generate()", ratios["gathered"], "", expected)
        report.figure(f"{name}: sharded, divided by generate()", ratios["sharded"], "")
        passes = row["passes"]["gathered"]
        report.shown(f"{name}: passes, share of the round", f"{passes} passes, {row['drawing_share']:.2f} of the round")
