"""Does it help? Methods and controls at the budget of sft, on one task: docs/evidence.md has the tables.

    python -m experiments.evidence sort --part dev       # vary the settings of the mixture one at a time
    python -m experiments.evidence sort --part test      # all arms; the test rows are read here alone
    python -m experiments.evidence sort --part curves    # sft and the mixture as they learn

`evidence.yaml` beside this file has the studies and their settings. For every seed, sft warms a model up, unless there
is a pretrained one; then every arm trains that model further, with as many steps as cost what those of sft cost.
`experiments/results/STUDY.jsonl` gets a line per run as each ends, and a run that has its line there is not repeated,
on whatever machine it was made. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from experiments import evidence_data, evidence_results
from experiments.evidence_study import PLAN, Study, study_of
from selfgen_ds.errors import InputError, RunFailed, Stopped
from selfgen_ds.pilot import launching, workers
from selfgen_ds.pilot.launching import Place
from selfgen_ds.pilot.runs import Arm, StudyRun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(PLAN["studies"]))
    parser.add_argument("--part", choices=list(PLAN["seeds"]), required=True)
    parser.add_argument("--data_dir", default="data", help="folder with e2e/ and gsm8k/")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="of studies that start from one")
    parser.add_argument("--embedding_model", default="sentence-transformers/all-MiniLM-L6-v2", help="of studies of E2E")
    parser.add_argument("--output_dir", default="runs/evidence")
    parser.add_argument("--scale", type=int, default=1, help="so many times as many rows and steps, for a GPU")
    parser.add_argument("--jobs", type=int, help="number of runs at the same time; by default one for each GPU or core")
    options = parser.parse_args()
    name = options.study if options.scale == 1 else f"{options.study}-x{options.scale}"
    folder = Path(options.output_dir).absolute() / name
    models = options.model, options.embedding_model
    study = replace(study_of(PLAN, options.study, folder, *models, options.scale), name=name)
    if options.part not in study.parts:
        parser.error(f"{options.study} has {', '.join(study.parts)} alone")
    source = Path(options.data_dir)
    if study.data in evidence_data.SETS and not (source / study.data).is_dir():
        parser.error(f"--data_dir: there is no folder {study.data} in {source}")
    jobs = options.jobs or study.plan.get("jobs") or len(launching.devices()) or os.cpu_count() or 1
    try:
        carry_out(study, options.part, source, jobs)
    except (InputError, RunFailed) as error:
        sys.exit(f"error: {error}")
    except Stopped:
        sys.exit("stopped; the same command goes on")


def carry_out(study: Study, part: str, source: Path, jobs: int) -> None:
    """Make those runs of a part of a study that its results lack."""
    evidence_data.write_rows(study.folder, study.data, source, study.plan["rows"])
    known = {(line["arm"], line["seed"]): line for line in evidence_results.read(study.name, part)}
    pairs = [(arm, seed) for seed in study.plan["seeds"][part] for arm in study.arms(part)]
    left = [(arm, seed) for arm, seed in pairs if not _is_known(study, part, arm, seed, known)]
    if not left:
        path = evidence_results.path_of(study.name)
        print(f"{path} has all runs of the part {part}; remove the lines of those that you want to repeat")
        return
    places = launching.places(jobs, 1, launching.devices())
    seeds = list(dict.fromkeys(seed for _, seed in left))
    _carry_out(study, study.warm_ups(seeds), places, lambda run: None, "warm-up")
    steps = {arm: line["steps"] for (arm, _), line in known.items()}
    for arm, seed in left:
        if arm.name not in steps:
            steps[arm.name] = study.steps(arm, seed, places[0])
    runs = [study.run(arm, seed, steps[arm.name], study.split(part)) for arm, seed in left]
    best = [run for run in runs if study.has_best(run.arm, part)]
    lock = Lock()

    def after(run: StudyRun) -> None:
        with lock:
            evidence_results.write(run, study.start | study.described(run), study.name, part)
            if run in best:
                study.export_best(run)
        run.remove_models()

    _carry_out(study, runs, places, after, f"{study.name}, {part}")
    bests = [study.best(run) for run in best]
    _carry_out(study, bests, places, after, "best checkpoints")
    for run in [*runs, *bests]:  # also those that were done before, and whose lines were removed
        evidence_results.write(run, study.start | study.described(run), study.name, part)


def _is_known(study: Study, part: str, arm: Arm, seed: int, known: dict[tuple[str, int], dict[str, Any]]) -> bool:
    """Return whether the results have a run, and its best checkpoint.

    Raises:
        RunFailed: They have it with other settings.
    """
    if (line := known.get((arm.name, seed))) is None:
        return False
    run = study.run(arm, seed, line["steps"], study.split(part))
    where = f"its line from {evidence_results.path_of(study.name)}"
    _check_settings(run, line["settings"], study.start | study.described(run), where)
    return not study.has_best(arm, part) or (study.best(run).arm.name, seed) in known


def _carry_out(
    study: Study, runs: list[StudyRun], places: list[Place], after: Callable[[StudyRun], None], told: str
) -> None:
    """Carry out all runs.

    Raises:
        RunFailed: A run failed, another process carries it out, or it was finished with other settings.
    """
    for run in runs:
        if run.evaluated:
            _check_settings(run, study.made(run), study.described(run), str(run.folder))
    failures = workers.carry_out(runs, places, after, told)
    if left := [run.name for run in runs if not run.done]:
        told = "\n".join(map(str, failures.values()))
        raise RunFailed(f"not done: {', '.join(left)}\n{told}")


def _check_settings(run: StudyRun, made: dict[str, Any], asked: dict[str, Any], where: str) -> None:
    """Check that a run that is finished was made as the study says now.

    Args:
        where: What has to be removed to have it made anew.
    """
    for name in dict.fromkeys([*asked, *made]):
        if made.get(name) != asked.get(name):
            told = f"{run.name} was made with {name} {made.get(name)!r}, and the study has {asked.get(name)!r}"
            raise RunFailed(f"{told}; remove {where} to make it anew")


if __name__ == "__main__":
    main()
