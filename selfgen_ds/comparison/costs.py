"""What the runs of a comparison have cost, from their `metrics.jsonl`."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a run; its start, evaluations and checkpoints are not counted."""

    steps: float
    """Optimizer steps."""
    tokens: float
    """Tokens that were trained on."""
    no_grad_tokens: float
    """Tokens that passes and rounds read without gradients."""
    flops: float
    """Floating-point operations of both (`selfgen_ds.engine.flops`)."""
    seconds: float
    """Time of the steps and of drawing the rounds."""

    @staticmethod
    def mean(costs: list[Cost]) -> Cost:
        """Return the mean cost of some runs."""
        return Cost(**{f.name: sum(getattr(cost, f.name) for cost in costs) / len(costs) for f in fields(Cost)})


def cost_of(path: Path) -> Cost | None:
    """Return the cost of a run.

    Args:
        path: The run's `metrics.jsonl`.

    Returns:
        None if a line lacks the counts, as those of older versions do.

    Raises:
        ValueError: A line is no JSON.
    """
    with open(path, "rb") as file:  # a killed run may not have finished its last line
        lines = [json.loads(line) for line in file if line.endswith(b"\n")]
    if not lines or any("flops" not in line for line in lines):
        return None
    return Cost(
        steps=len(lines),
        tokens=sum(line["tokens"] for line in lines),
        no_grad_tokens=sum(line["no_grad_tokens"] for line in lines),
        flops=sum(line["flops"] for line in lines),
        seconds=sum(line["step_time_s"] + line.get("round_time_s", 0.0) for line in lines),
    )
