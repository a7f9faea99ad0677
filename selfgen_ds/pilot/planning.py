"""The plan of a pilot: the price of each method, and the steps of it that cost as much as those of sft."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from selfgen_ds import methods
from selfgen_ds.config import ModelConfig, Recipe, Source
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.evaluation.metrics import kind_and_metric
from selfgen_ds.files import as_json, write_atomically
from selfgen_ds.model.loading import from_config, model_config, vocabulary
from selfgen_ds.pilot import budget, launching
from selfgen_ds.pilot.launching import Place
from selfgen_ds.pilot.rows import PilotRows, some_rows
from selfgen_ds.pilot.runs import Arm, as_options

log = logging.getLogger("selfgen_ds")

RECIPE = "recipe.yaml"
"""The recipe of the runs, in the folder of the pilot."""
_PLAN = "plan.json"
LEAST_COST = 0.9
"""Share of the budget below which a method is told to leave a part of it."""
_PROBED_STEPS = 4
_EVALUATED_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """Plan of an arm."""

    steps: int
    """Optimizer steps of each of its runs."""
    cost: float
    """Floating-point operations of a run, relative to those of sft."""
    step_time_s: float
    """Measured time of a step, without that of drawing rounds."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plan of a pilot."""

    rows_per_step: int
    """Rows of an optimizer step."""
    rows_per_epoch: int
    """Rows that the training rows become, which are fewer if rows are packed or refused."""
    sft_steps: int
    """Optimizer steps of sft, which are the budget."""
    sft_probe: dict[str, float]
    """Cost of the probe of sft, to which those of the methods are compared."""
    arms: dict[str, ArmPlan]
    """Name of an arm -> its plan; sft is the first."""


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Takes a few steps of arms on some of the training rows, and saves nothing."""

    recipe: str
    """File of the recipe of the runs."""
    rows: PilotRows
    place: Place
    folder: Path
    stop: Event

    def of(self, arm: Arm, steps: int, settings: dict[str, Any]) -> dict[str, float]:
        """Return the cost of some steps, as `selfgen-ds probe` prints it.

        Raises:
            InputError: A run of the arm would be refused; every line names the arm.
        """
        options = ["--config", self.recipe, *as_options(arm.settings | settings)]
        try:
            return budget.probe(options, steps, self.place, self.folder, self.stop)
        except InputError as error:
            raise InputError("\n".join(f"{arm.name}: {line}" for line in str(error).splitlines())) from error

    def of_few(self, arm: Arm, whole: dict[str, float]) -> dict[str, float]:
        """Return the cost of a few steps, spread over a run.

        Args:
            whole: Cost of the probe of sft that has taken no step, but has read all rows.
        """
        count = _PROBED_STEPS * whole["rows_per_step"] * self.rows.trained / whole["rows"]
        rows = some_rows(self.rows, round(count), self.folder / "rows")
        # A round is drawn with the p of its number, and there are as many as the probed rows are read: let it be one.
        steps = _PROBED_STEPS if _has_rounds(arm) else int(whole["total_steps"])
        return self.of(arm, _PROBED_STEPS, {"data.train": as_setting(rows), "train.max_steps": steps})


def _has_rounds(arm: Arm) -> bool:
    try:
        return methods.find(arm.settings["selfgen.method"]).has_rounds
    except InputError:  # there is no such method, as the probe will say
        return False


def plan_of(arms: list[Arm], recipe: Recipe, probes: Probes, folder: Path) -> Plan:
    """Return the plan of a pilot, in which every arm is probed once. The first arm is sft.

    Every method is loaded and takes some steps, so that what it refuses is told before the first run.

    Args:
        recipe: The user's recipe.
        folder: Folder of the pilot.

    Raises:
        InputError: A run would be refused, or a method costs more than the whole budget before its first step.
        RunFailed: A probe failed.
        Stopped: A signal came.
    """
    if (plan := _read(folder / _PLAN)) is None:
        log.info("sft: reading all rows, and taking a few steps to see what they cost")
        plan = _begin(arms[0], probes)
    for arm in arms:
        if arm.name not in plan.arms:
            log.info("%s: taking a few steps to see what they cost", arm.name)
            plan = replace(plan, arms=plan.arms | {arm.name: _planned(arm, recipe, plan, probes)})
    write_atomically(folder / _PLAN, as_json(asdict(plan)))
    shutil.rmtree(probes.folder, ignore_errors=True)
    return plan


def _read(path: Path) -> Plan | None:
    if not path.exists():
        return None
    held = json.loads(path.read_text(encoding="utf-8"))
    return Plan(**held | {"arms": {name: ArmPlan(**arm) for name, arm in held["arms"].items()}})


def _begin(sft: Arm, probes: Probes) -> Plan:
    """Return the plan of sft alone; all rows are read, those to evaluate on as well."""
    held_out = {"data.eval": as_setting(probes.rows.held_out), "eval.max_samples": probes.rows.evaluated}
    whole = probes.of(sft, 0, held_out)
    few = probes.of_few(sft, whole)
    steps = int(whole["total_steps"])
    return Plan(
        rows_per_step=int(whole["rows_per_step"]),
        rows_per_epoch=int(whole["rows"]),
        sft_steps=steps,
        sft_probe=few,
        arms={sft.name: ArmPlan(steps=steps, cost=1.0, step_time_s=few["step_time_s"])},
    )


def _planned(arm: Arm, recipe: Recipe, plan: Plan, probes: Probes) -> ArmPlan:
    whole = {"rows_per_step": plan.rows_per_step, "rows": plan.rows_per_epoch, "total_steps": plan.sft_steps}
    cost = probes.of_few(arm, {name: float(value) for name, value in whole.items()})
    price = budget.price(cost, plan.sft_probe)
    epochs = arm.settings.get("selfgen.epochs_per_round", recipe.selfgen.epochs_per_round)
    shape = plan.rows_per_step, plan.rows_per_epoch, epochs
    steps = budget.steps_within(price, plan.sft_steps, *shape)
    if not steps:
        least = budget.cost_of(price, 1, *shape) / plan.rows_per_step
        longer = "train.epochs" if recipe.train.max_steps is None else "train.max_steps"
        raise InputError(
            f"{arm.name}: its first step, with the round before it if there is one, costs {least:.1f} steps of sft, "
            f"and the budget is that of {plan.sft_steps}: raise {longer}, or leave the method out"
        )
    relative = budget.cost_of(price, steps, *shape) / (plan.sft_steps * plan.rows_per_step)
    return ArmPlan(steps=steps, cost=relative, step_time_s=cost["step_time_s"])


def check_evaluation(model: ModelConfig, options: dict[str, Any], metrics: list[str], probes: Probes) -> None:
    """Evaluate the starting model on a few rows, so that what `evaluate` refuses is told before the first run.

    Args:
        model: That of the runs; if it is no folder or hub id that has all parts, one with random weights is evaluated.
        options: Those of `evaluate`, without the model and the folder.
        metrics: Metrics that verdicts are asked for.

    Raises:
        InputError: The evaluation is refused, or makes no answers of the kind that a metric needs.
        RunFailed: It failed.
        Stopped: A signal came.
    """
    log.info("evaluating the starting model on %d rows, to see that it can be done", _EVALUATED_ROWS)
    whole = model.name_or_path is not None and model.tokenizer is None
    start = str(model.name_or_path) if whole else str(_random_model(model, probes.folder / "start"))
    few = {"model": start, "max_samples": _EVALUATED_ROWS, "output_dir": str(probes.folder)}
    command, started = ["evaluate", *as_options(options | few)], time.monotonic()
    launching.run(command, probes.place, probes.folder / "evaluate.log", probes.stop)
    log.info("the evaluation of %d rows took %.0f s", _EVALUATED_ROWS, time.monotonic() - started)
    check_metrics(metrics, probes.folder)
    shutil.rmtree(probes.folder)


def _random_model(model: ModelConfig, folder: Path) -> Path:
    """Write a model with random weights, and its tokenizer, and return the folder."""
    tokenizer = load_tokenizer(model)
    built = from_config(model, model_config(model, tokenizer), dtype=getattr(torch, model.dtype))
    # With `model.resize_embeddings`, the tokenizer may have more ids than the model that the runs start from.
    embeddings = max(vocabulary(tokenizer), built.get_input_embeddings().num_embeddings)
    built.resize_token_embeddings(embeddings, mean_resizing=False)
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check_metrics(metrics: list[str], folder: Path) -> None:
    """Check that an evaluation has made answers of the kinds that metrics need.

    Args:
        folder: Folder of the evaluation.

    Raises:
        InputError: It has not.
    """
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    kinds = {kind_and_metric(name)[0] for name in evaluation["metrics"]}
    if missing := [name for name in metrics if kind_and_metric(name)[0] not in kinds]:
        raise InputError(f"--metrics: --evaluation asks for no answers of the kind of {', '.join(missing)}")


def begin_anew(folder: Path) -> None:
    """Remove what a pilot has left that was refused or stopped before its plan was made."""
    for name in ("data", "probe"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (_PLAN, RECIPE):
        (folder / name).unlink(missing_ok=True)


def as_setting(sources: list[Source]) -> list[dict[str, Any]]:
    """Return sources as the value of a setting on the command line."""
    return [{name: value for name, value in asdict(source).items() if value is not None} for source in sources]
