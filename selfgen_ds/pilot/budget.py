"""Steps of a method that cost as many floating-point operations as a number of steps of sft.

A few steps of each method on the same rows, and the rounds that they draw, say what a row costs relative to sft; the
operations are those of `selfgen_ds.engine.flops`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from selfgen_ds.pilot import launching
from selfgen_ds.pilot.launching import Place


@dataclass(frozen=True, kw_only=True)
class Price:
    """Price of a method, in units of training on a row by sft."""

    of_row: float
    """Training on a row, with the passes of the step."""
    of_round: float
    """Drawing a row of a round; 0 for a method without rounds."""


def probe(arguments: list[str], steps: int, place: Place, folder: Path, stop: Event) -> dict[str, float]:
    """Return what `selfgen-ds probe` prints of some steps.

    Args:
        arguments: The options of `train`.
        folder: Folder for the files of the probe.

    Raises:
        InputError: The run would be refused, with the lines that say why.
        RunFailed: The probe failed.
        Stopped: `stop` was set.
    """
    printed = folder / "probe.json"
    options = [*arguments, "--output_dir", str(folder / "run"), "--steps", str(steps)]
    launching.run(["probe", *options], place, folder / "probe.log", stop, printed)
    cost: dict[str, float] = json.loads(printed.read_text(encoding="utf-8").splitlines()[-1])  # others may print too
    return cost


def price(cost: dict[str, float], sft: dict[str, float]) -> Price:
    """Return the price of a method from its probe and that of sft on the same rows."""
    of_sft = sft["step_flops"] / sft["steps"]
    of_round = cost["round_flops"] / (cost["rounds"] * cost["rows"]) if cost["rounds"] else 0.0
    return Price(of_row=cost["step_flops"] / cost["steps"] / of_sft, of_round=of_round / of_sft * sft["rows_per_step"])


def steps_within(
    price: Price, sft_steps: int, rows_per_step: int, rows_per_epoch: int, epochs_per_round: int = 1
) -> int:
    """Return the largest number of steps that cost no more than the steps of sft; 0 if not one does.

    A round is drawn for the whole data set, also if the run ends within it.
    """
    steps = sft_steps
    while steps and cost_of(price, steps, rows_per_step, rows_per_epoch, epochs_per_round) > sft_steps * rows_per_step:
        steps -= 1
    return steps


def cost_of(price: Price, steps: int, rows_per_step: int, rows_per_epoch: int, epochs_per_round: int = 1) -> float:
    """Return what steps of a method cost, in units of training on a row by sft."""
    rounds = -(-steps * rows_per_step // (epochs_per_round * rows_per_epoch))
    return steps * rows_per_step * price.of_row + rounds * rows_per_epoch * price.of_round
