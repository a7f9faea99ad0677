"""What a self-generated-token pass adds to a training step, as `selfgen-ds bench` measures it."""

from __future__ import annotations

from gpu_checks.benches import run_bench
from gpu_checks.rows import Report

_SFT_SECONDS = (0.20, 0.28)  # of recipes/bench-1b.yaml: 4 rows of 2048 tokens
_RATIOS = {0.0: (0.97, 1.03), 0.25: (1.18, 1.25), 0.5: (1.18, 1.25)}
"""Replacement probability -> expected time of a step, divided by the time of sft's step."""


def check(report: Report) -> None:
    """Report time, memory, gathers and invalidations of the trace for every variant, and the memory of the loss."""
    record = run_bench(report, "budget", report.sizes.bench)
    for row in record["rows"]:
        accumulation, p = row["gradient_accumulation_steps"], row["replace_probability"]
        where = f"accumulation {accumulation}"
        if row["variant"] == "sft":
            report.figure(f"sft, {where}", row["step_time_s"], "s", _SFT_SECONDS if accumulation == 1 else None)
            report.figure(f"sft, {where}: tokens", row["tokens_per_second"], "per second")
            if row["mfu"] is not None:
                report.figure(f"sft, {where}: model FLOPs utilization", row["mfu"], "", (0.3, 0.45))
            continue
        name = f"p {p:g}, one pass, {where}"
        report.figure(f"{name}: time divided by sft's", row["step_time_ratio"], "", _RATIOS[p])
        memory = row["peak_memory_ratio"]
        report.result(f"{name}: peak memory divided by sft's", "at most 1.02", f"{memory:.4f}", memory <= 1.02)
        gathers = f"{row['gathers']:.2f} copies of the parameters, {row['extra_gathers']:+.2f} to sft"
        report.shown(f"{name}: gathers, groups", f"{gathers}, {row['groups']} groups")
    lost = sum(row["trace_invalidations"] for row in record["rows"])
    report.result("invalidations of the trace", "0", str(lost), lost == 0)
    plain, ours = record["losses"]
    ratio = ours["peak_memory_ratio"]
    report.result("memory of the loss, divided by that of whole logits", "at most 0.5", f"{ratio:.3f}", ratio <= 0.5)
    report.figure("time of the loss, divided by that of whole logits", ours["time_s"] / plain["time_s"], "", (0.5, 1.5))
