"""Checks of the settings that name rows: `data.train` and `data.eval` of a recipe, `--data` of `evaluate`."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from selfgen_ds.config import Source, Sources, sources
from selfgen_ds.data.tasks import BUILTIN, SPLITS, TASKS, split_of, task_of
from selfgen_ds.errors import Problems

_HUB_ID = re.compile(r"(?!.*\.(jsonl|json|csv|parquet|arrow)$)[\w-][\w.-]*(/[\w-][\w.-]*)?")


def check_sources(problems: Problems, setting: str, value: Sources | None) -> None:
    """Check a setting for rows as far as the names of its sources tell; no file is opened."""
    given = sources(value)
    if value is not None and not given:
        problems.add(f"{setting}: expected at least one source")
    for source in given:
        _check_source(problems, setting, source)
    tasks = [source for source in given if task_of(source.path) is not None]
    if setting != "data.train" and 0 < len(tasks) < len(given):
        problems.add(f"{setting}: expected built-in tasks alone, whose recovery is measured, or none")
    weighted = [source for source in given if source.weight is not None]
    if weighted and setting != "data.train":
        problems.add(f"{setting}: weights are for data.train")
    elif weighted and len(weighted) < len(given):
        problems.add(f"{setting}: expected a weight for every source, or for none")


def _check_source(problems: Problems, setting: str, source: Source) -> None:
    name, exists, task = source.path, Path(source.path).exists(), task_of(source.path)
    is_task = task is not None
    if name.startswith(("{", "[")):
        keys = ", ".join(f.name for f in fields(Source))
        problems.add(f"{setting}: expected a source with the keys {keys}, got {name}")
    elif not name:
        problems.add(f"{setting}: expected a file or folder, a hub id, or builtin:<task>, got an empty string")
    elif is_task and task not in TASKS:
        tasks = ", ".join(BUILTIN + known for known in TASKS)
        problems.add(f"{setting}: unknown task {task!r}; the built-in tasks are {tasks}")
    elif is_task and (split := split_of(name, "train")) not in SPLITS:
        problems.add(f"{setting}: unknown split {split!r} of a built-in task; there are {', '.join(SPLITS)}")
    elif not exists and not is_task and not _HUB_ID.fullmatch(name):
        several = f"; several are [{name}]" if "," in name else ""
        expected = "expected an existing file or folder, a hub id, or builtin:<task>"
        problems.add(f"{setting}: {expected}, got {name!r}{several}")
    if (is_task or Path(name).is_file()) and (source.subset or source.split):
        problems.add(f"{setting}: {name} is one file or task, without subsets or splits to choose from")
    if source.streaming and (exists or is_task):
        problems.add(f"{setting}: streaming is for hub data sets; {name} is read from this machine")
    if source.weight is not None and not 0 < source.weight < float("inf"):
        problems.add(f"{setting}: weight: expected a number more than 0, got {source.weight!r}")
