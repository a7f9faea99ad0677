"""The figures of a row of `bench.json`: medians, quartiles, and ratios to sft."""

from __future__ import annotations

from typing import Any

import numpy as np

from selfgen_ds.scaling.clock import PHASES


def step_times(times: list[list[float]], sft_times: list[list[float]]) -> dict[str, Any]:
    """Return the statistics of a variant's step times.

    Args:
        times: `[steps][phases + 1]`, the seconds of each of `PHASES` and of the whole step.
        sft_times: The same of sft, whose steps took turns with the variant's.

    Returns:
        Median and quartiles of the step and of each phase, in seconds; the median of each phase divided by the median
        of sft's step; and the median and the quartiles, over turns, of the step's time divided by the time of sft's
        step in the same turn.
    """
    seconds, sft_seconds = np.array(times), np.array(sft_times)
    low, ratio, high = _quartiles(seconds[:, -1] / sft_seconds[:, -1])
    step = _quartiles(seconds[:, -1])
    phases = {name: _quartiles(column) for name, column in zip(PHASES, seconds.T, strict=False)}
    sft_step = float(np.median(sft_seconds[:, -1]))
    return {
        "step_time_s": step[1],
        "step_time_s_quartiles": [step[0], step[2]],
        "phases_s": phases,
        "phases_ratio": {name: median / sft_step for name, (_, median, _) in phases.items()},
        "step_time_ratio": ratio,
        "step_time_ratio_quartiles": [low, high],
    }


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.percentile(values, [25, 50, 75])]


def memory_and_collectives(costs: dict[str, Any], sft_costs: dict[str, Any], parameter_bytes: int) -> dict[str, Any]:
    """Return a step's memory and collectives relative to those of sft.

    Args:
        costs: `peak_memory_bytes`, `gathered_bytes`, and `collectives`: calls and bytes by name.
        sft_costs: The same of sft.
        parameter_bytes: Size of all parameters.

    Returns:
        Ratios to sft, and `gathers` and `extra_gathers` in copies of all parameters. A collective that sft does not
        make has no ratio.
    """
    return {
        "peak_memory_ratio": costs["peak_memory_bytes"] / sft_costs["peak_memory_bytes"],
        "gathers": costs["gathered_bytes"] / parameter_bytes,
        "extra_gathers": (costs["gathered_bytes"] - sft_costs["gathered_bytes"]) / parameter_bytes,
        "collectives_ratio": {
            operation: {unit: costs["collectives"][operation][unit] / value for unit, value in counts.items() if value}
            for operation, counts in sft_costs["collectives"].items()
            if operation in costs["collectives"]
        },
    }


def rates(
    times: list[list[float]], tokens: int, parameters: int, world_size: int, peak_flops: float | None
) -> dict[str, float | None]:
    """Return the tokens per second over all ranks, and the model FLOPs utilization (MFU) of an accelerator.

    The model's work is 6 operations per parameter and token (Kaplan et al. 2020). Activations that checkpointing
    computes again, and the self-generated-token pass, do not count as the model's work (Chowdhery et al. 2022).

    Args:
        times: `[steps][phases + 1]`, as for `step_times`.
        tokens: Tokens of a step, over all ranks.
        parameters: Number of the model's parameters.
        peak_flops: Operations per second of one accelerator; None if unknown, and then there is no MFU.
    """
    seconds = float(np.median(np.array(times)[:, -1]))
    flops = tokens * 6 * parameters / world_size
    return {"tokens_per_second": tokens / seconds, "mfu": None if peak_flops is None else flops / seconds / peak_flops}
