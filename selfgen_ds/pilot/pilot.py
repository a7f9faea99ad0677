"""`selfgen-ds pilot`: rows -> the price of each method -> runs -> verdicts -> the report."""

from __future__ import annotations

import logging
import os
import re
from argparse import ArgumentError
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from jsonargparse import ArgumentParser

from selfgen_ds import packaged
from selfgen_ds.comparison.intervals import LEAST_ROWS
from selfgen_ds.comparison.runs import Group, grouped, load_run
from selfgen_ds.config import (
    EvalConfig,
    EvaluateOptions,
    OptimConfig,
    PilotOptions,
    Recipe,
    SelfgenConfig,
    by_name,
    default_settings,
    to_yaml,
)
from selfgen_ds.errors import InputError, Problems, RunFailed
from selfgen_ds.evaluate import text_metrics
from selfgen_ds.evaluation.metrics import is_taken, metric_of
from selfgen_ds.files import make_folder, write_atomically
from selfgen_ds.pilot import launching, report, workers
from selfgen_ds.pilot.launching import Place
from selfgen_ds.pilot.planning import (
    LEAST_COST,
    RECIPE,
    Plan,
    Probes,
    as_setting,
    begin_anew,
    check_evaluation,
    check_metrics,
    plan_of,
)
from selfgen_ds.pilot.rows import PilotRows, draw, kinds
from selfgen_ds.pilot.runs import Arm, StudyRun
from selfgen_ds.validation.options import check_evaluate
from selfgen_ds.validation.recipe import check_recipe
from selfgen_ds.validation.settings import check_settings

log = logging.getLogger("selfgen_ds")

_RECORD, _LOCK = "pilot.yaml", ".pilot.lock"
_MAY_CHANGE = {"methods", "seeds", "metrics", "group_by", "jobs", "keep_models"}
"""Options that may change when a pilot goes on."""
_OF_EVALUATION = ("evaluation", "corrections", "metrics")
"""What was recorded of the evaluation; it may change as long as no run has been evaluated."""
_LAUNCHERS = {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"}  # of torchrun and deepspeed, and of mpirun
_OF_DATA = ("prompt_column", "completion_column", "messages_column", "as_chat", "prompt_template", "max_refused_share")
_OF_MODEL = ("chat_template", "attn_implementation", "trust_remote_code")
"""Options of `evaluate` that the recipe's sections `data` and `model` give."""
_OWN = {"model", "data", "output_dir", "date", "max_length", "max_samples", *_OF_DATA, *_OF_MODEL}
"""Options of `evaluate` that the pilot gives."""


def pilot(recipe: Recipe, options: PilotOptions) -> None:
    """Carry out a pilot, or what is left of it, and write the report when all runs are done.

    Several processes may call this for the same folder, on several hosts, and share the runs.

    Raises:
        InputError: The options, the recipe or the data are not as expected, or the folder holds something else.
        RunFailed: A run failed; the other methods are done and reported.
        Stopped: A signal came; the runs that were under way are saved.
    """
    if _LAUNCHERS & os.environ.keys():
        raise InputError("pilot: start one process on each host, without a launcher; --ranks and --jobs start others")
    problems = Problems()
    arms = arms_of(problems, recipe, options)
    _check(problems, arms, recipe, options)
    problems.raise_all()
    for arm in arms[1:]:
        _check_arm(problems, arm, recipe)
    problems.raise_all()
    folder = Path(recipe.output_dir).resolve()
    recipe = replace(recipe, output_dir=str(folder))
    make_folder(folder, "output_dir")
    places = launching.places(options.jobs, options.ranks, launching.devices())
    with _alone(folder):
        rows, plan, evaluation = _prepare(arms, recipe, options, places[0])
    runs = _runs(arms, plan, recipe, options, evaluation)
    _log_plan(plan, rows, runs, len(places))
    after = (lambda run: None) if options.keep_models else StudyRun.remove_models
    failures = workers.carry_out(runs, places, after, "pilot")
    of_others = [run for run in runs if not run.evaluated and run.arm.name not in failures]
    complete = [arm for arm in arms if all(run.evaluated for run in runs if run.arm == arm)]
    if of_others:
        log.info(
            "%d of %d runs are left to other processes, whose last one writes the report", len(of_others), len(runs)
        )
    elif arms[0] in complete:
        report.write(_groups(complete, runs), [arm.settings for arm in complete], plan, rows, recipe, options)
    if failures:
        lines = [f"{name}: {error}" for name, error in failures.items()]
        if not of_others:
            lines.append("the other methods are reported" if arms[0] in complete else "without sft, there is no report")
        raise RunFailed("\n".join([*lines, "the same command repeats the runs that failed"]))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no other process make the plan of the pilot while in the context."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.info("another process makes the plan of this pilot: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(
    arms: list[Arm], recipe: Recipe, options: PilotOptions, place: Place
) -> tuple[PilotRows, Plan, dict[str, Any]]:
    """Return the rows of a pilot, its plan, and the options of `evaluate`; make them if they are not there.

    Only one process may call this at a time.
    """
    folder = Path(recipe.output_dir)
    evaluated = sorted(folder.glob("runs/*/.evaluated"))
    before, record = _before(folder), _record(arms, recipe, options)
    if before:
        record["corrections"] = record["corrections"] or before.get("corrections", {})
        _check_unchanged(before, record, folder, set() if evaluated else {*_OF_EVALUATION})
    else:
        begin_anew(folder)
    rows = draw(recipe.data, options.rows, options.held_out, recipe.seed, folder / "data")
    if options.group_by is not None:
        _check_kinds(Counter(kinds(options.group_by, rows)), options.group_by)
    if not (path := folder / RECIPE).exists():
        write_atomically(path, to_yaml(_recipe_of_runs(recipe, rows)))
    day = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["date"]
    evaluation = _evaluation(recipe, rows) | record["corrections"] | options.evaluation | {"date": day}
    with workers.stopping() as stop:
        probes = Probes(recipe=str(path), rows=rows, place=place, folder=folder / "probe", stop=stop)
        if evaluated:
            check_metrics(options.metrics, evaluated[0].parent)
        elif any(before.get(name) != record[name] for name in _OF_EVALUATION):
            check_evaluation(recipe.model, evaluation, options.metrics, probes)
        plan = plan_of(arms, recipe, probes, folder)
    write_atomically(folder / _RECORD, yaml.safe_dump(record, sort_keys=False))
    return rows, plan, evaluation


def _check_kinds(counts: Counter[str], field: str) -> None:
    """Check that a kind of rows has enough held-out rows for a verdict, and tell of those that have not.

    Raises:
        InputError: None has.
    """
    few = [kind for kind, count in counts.items() if count < LEAST_ROWS]
    told = f"--group_by: {len(few)} of {len(counts)} kinds of {field!r} have fewer than {LEAST_ROWS} held-out rows"
    if len(few) == len(counts):
        raise InputError(f"{told}, and no kind can have a verdict: raise --held_out, or leave --group_by out")
    if few:
        log.warning("%s, and will have no verdict: %s", told, ", ".join(few[:10]))


def arms_of(problems: Problems, recipe: Recipe, options: PilotOptions) -> list[Arm]:
    """Return sft and the methods of the options as arms, in this order; add problems of their settings."""
    default = "scheduled_sampling" if recipe.selfgen.method == "sft" else recipe.selfgen.method
    arms = [Arm(name="sft", settings={"selfgen.method": "sft"})]
    known = {field.name for field in fields(SelfgenConfig)} | {f"optim.{field.name}" for field in fields(OptimConfig)}
    for given in options.methods or [default]:
        settings = {"method": given} if isinstance(given, str) else given
        if "method" not in settings or (unknown := sorted(settings.keys() - known)):
            wrong = "no method" if "method" not in settings else ", ".join(unknown)
            expected = "expected names of methods, or settings of `selfgen` with a method, and `optim.` settings"
            problems.add(f"--methods: {expected}, got {wrong}")
            continue
        parts = [str(settings["method"]), *(f"{key}-{value}" for key, value in settings.items() if key != "method")]
        name = re.sub(r"[^\w.-]+", "-", "-".join(parts))
        if any(arm.name == name for arm in arms):
            twice = "" if name == "sft" else " twice"
            problems.add(f"--methods: expected every method once, and sft not at all, got {name}{twice}")
        dotted = {key if "." in key else f"selfgen.{key}": value for key, value in settings.items()}
        arms.append(Arm(name=name, settings=dotted))
    return arms


def _check_arm(problems: Problems, arm: Arm, recipe: Recipe) -> None:
    """Check the settings of a method, before anything is loaded."""
    parser = ArgumentParser(exit_on_error=False)
    own: dict[str, dict[str, Any]] = {"selfgen": asdict(recipe.selfgen), "optim": asdict(recipe.optim)}
    parser.add_class_arguments(SelfgenConfig, "selfgen")
    parser.add_class_arguments(OptimConfig, "optim")
    for name, value in arm.settings.items():
        section, _, key = name.partition(".")
        own[section][key] = value
    try:
        parsed = parser.instantiate(parser.parse_object(own))
    except ArgumentError as error:
        problems.add(f"--methods: {arm.name}: {' '.join(str(error).split())}")
        return
    found = Problems()
    check_settings(found, replace(recipe, selfgen=parsed.selfgen, optim=parsed.optim), set(arm.settings))
    problems.add(*(f"--methods: {arm.name}: {line}" for line in found.lines))


def _check(problems: Problems, arms: list[Arm], recipe: Recipe, options: PilotOptions) -> None:
    """Check the options that need no data."""
    for name, least in (("rows", 1), ("held_out", LEAST_ROWS), ("seeds", 1), ("ranks", 1), ("jobs", 1)):
        value = getattr(options, name)
        problems.expect(value >= least, f"--{name}", f"{least} or more", value)
    problems.expect(recipe.resume is None, "resume", "no value: a pilot always goes on", recipe.resume)
    with problems.collect():
        check_recipe(problems, recipe)
    if "metric" not in options.evaluation and (unknown := [name for name in options.metrics if not is_taken(name)]):
        problems.add(f"--metrics: there is no metric {', '.join(unknown)}")
    if sideless := [name for name in options.metrics if is_taken(name) and not metric_of(name).better]:
        problems.add(f"--metrics: {', '.join(sideless)} can give no verdict: neither side is better")
    if len(cues := _cues(arms, recipe)) > 1:
        problems.add(f"--methods: expected one cue, with which `evaluate` asks for corrections, got {cues}")
    given = _evaluation_options(problems, options.evaluation)
    if given is not None:
        found = Problems()
        check_evaluate(found, given)
        with found.collect():
            text_metrics(given)
        lines = (line.removeprefix("--") for line in found.lines if not line.startswith("--model:"))
        problems.add(*(f"--evaluation: {line}" for line in lines))


def _cues(arms: list[Arm], recipe: Recipe) -> set[str | None]:
    """Return the cues of the arms that learn to correct themselves."""
    of_rac = [arm.settings for arm in arms if arm.settings["selfgen.method"] == "rac"]
    return {settings.get("selfgen.cue", recipe.selfgen.cue) for settings in of_rac}


def _evaluation_options(problems: Problems, given: dict[str, Any]) -> EvaluateOptions | None:
    """Return the options of `evaluate`; None, with a problem, if a name or a value is not as expected."""
    names = {field.name for field in fields(EvaluateOptions)} - _OWN
    if unknown := sorted(given.keys() - names):
        problems.add(f"--evaluation: expected {', '.join(sorted(names))}, got {', '.join(unknown)}")
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EvaluateOptions)
    try:
        parsed = parser.parse_object(given | {"model": ".", "data": ".", "output_dir": "."})
    except ArgumentError as error:
        problems.add(f"--evaluation: {' '.join(str(error).split())}")
        return None
    return EvaluateOptions(**vars(parsed))


def _record(arms: list[Arm], recipe: Recipe, options: PilotOptions) -> dict[str, Any]:
    """Return the settings of a pilot, which are recorded in its folder."""
    path = packaged.find(recipe.deepspeed, "ds_configs")
    json_text = path.read_text(encoding="utf-8") if path.is_file() else None
    asked: dict[str, Any] = {}
    if cues := _cues(arms, recipe):
        (cue,) = cues
        asked = {"correction_rounds": 1} | ({} if cue is None else {"cue": cue})
    return by_name(recipe) | asdict(options) | {"corrections": asked, "DeepSpeed JSON": json_text}


def _before(folder: Path) -> dict[str, Any]:
    """Return the record of the pilot of the folder, empty before its plan is made; record that a pilot is here.

    Raises:
        InputError: The folder holds something else.
    """
    path = folder / _RECORD
    if not path.exists():
        if others := sorted(entry.name for entry in folder.iterdir() if entry.name != _LOCK):
            raise InputError(f"output_dir: expected an empty folder, or that of a pilot; {folder} has {others[0]}")
        write_atomically(path, "{}\n")
    before: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return default_settings() | before if before else {}  # an older version did not have every setting


def _check_unchanged(before: dict[str, Any], record: dict[str, Any], folder: Path, free: set[str]) -> None:
    """Check that a pilot goes on as it was begun.

    Args:
        free: Names that may change, besides those that always may.

    Raises:
        InputError: Other settings differ.
    """
    problems = Problems()
    for name, new in record.items():
        if before.get(name, new) == new or name in free | _MAY_CHANGE:
            continue
        if name == "corrections":
            how = f"with {before[name]}" if before[name] else "without corrections"
            problems.add(f"--methods: runs of the pilot in {folder} were evaluated {how}, and rac needs {new}")
        else:
            problems.add(f"{name}: the pilot in {folder} was begun with {before.get(name)!r}, got {new!r}")
    if problems.lines:
        problems.add("output_dir: give another one for a pilot with other settings")
    problems.raise_all()


def _recipe_of_runs(recipe: Recipe, rows: PilotRows) -> Recipe:
    """Return the recipe that all runs of a pilot start from: nothing is chosen by the held-out rows."""
    lora = recipe.model.lora
    return replace(
        recipe,
        model=replace(recipe.model, lora=None if lora is None else replace(lora, export="merged")),
        data=replace(recipe.data, train=[*rows.train], eval=None, date=recipe.data.date or str(date.today())),
        checkpoint=replace(recipe.checkpoint, keep=1),
        eval=EvalConfig(),
        wandb_project=None,
    )


def _runs(
    arms: list[Arm], plan: Plan, recipe: Recipe, options: PilotOptions, evaluation: dict[str, Any]
) -> list[StudyRun]:
    """Return all runs of a pilot, seed by seed."""
    folder, seeds = Path(recipe.output_dir), range(recipe.seed, recipe.seed + options.seeds)
    return [
        StudyRun(
            arm=arm,
            seed=seed,
            folder=folder / "runs" / f"{arm.name}-{seed}",
            recipe=str(folder / RECIPE),
            steps=plan.arms[arm.name].steps,
            evaluation=evaluation,
        )
        for seed in seeds
        for arm in arms
    ]


def _evaluation(recipe: Recipe, rows: PilotRows) -> dict[str, Any]:
    """Return the options of `evaluate` by which the held-out rows are read as those of the training are."""
    read = {name: getattr(recipe.data, name) for name in (*_OF_DATA, "max_length")}
    read |= {name: getattr(recipe.model, name) for name in _OF_MODEL}
    return {"data": as_setting(rows.held_out)} | read


def _log_plan(plan: Plan, rows: PilotRows, runs: list[StudyRun], jobs: int) -> None:
    counts = rows.trained, rows.whole, rows.evaluated, plan.rows_per_step
    log.info("%d of %d training rows, %d rows held out, %d rows per step", *counts)
    seconds = 0.0
    for name in dict.fromkeys(run.arm.name for run in runs):
        arm = plan.arms[name]
        told = "%s: %d steps, %.2f times the operations of sft, %.2g s per step"
        log.info(told, name, arm.steps, arm.cost, arm.step_time_s)
        if arm.cost < LEAST_COST:
            log.warning("%s: with one step more, it would cost more than sft; longer runs meet the budget better", name)
        seconds += arm.steps * arm.step_time_s * sum(run.arm.name == name for run in runs)
    told = "%d runs, %d at a time: steps of about %.1f minutes in all; rounds and evaluations come on top"
    log.info(told, len(runs), jobs, seconds / jobs / 60)
    if len({run.seed for run in runs}) < 3:
        log.warning("with fewer than three seeds, hardly any difference can be shown, and with one seed none")


def _groups(arms: list[Arm], runs: list[StudyRun]) -> list[Group]:
    """Return the evaluated runs of each arm; an arm with settings of its own has its method's name and a number."""
    groups, numbers = [], Counter[str]()
    for arm in arms:
        (group,) = grouped([load_run(run.folder) for run in runs if run.arm == arm])
        if len(arm.settings) > 1:
            numbers[group.method] += 1
            group = replace(group, method=f"{group.method} {numbers[group.method]}")
        groups.append(group)
    return groups
