"""Runs of a study: an arm and a seed each, trained and evaluated by `selfgen-ds` in processes of their own.

A run's folder tells how far it is: `evaluation.json` may be there before a judge has been asked, so that a mark,
`.evaluated`, says that all commands have ended well. What follows them, such as removing the model, ends with `.done`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Arm of a study: a method and its settings."""

    name: str
    """Start of the names of its runs' folders."""
    settings: dict[str, Any]
    """Settings of the recipe, such as `{"selfgen.method": "bash"}`; `{seed}` in a text is the seed of the run."""


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study."""

    arm: Arm
    seed: int
    folder: Path
    recipe: str
    """Recipe that all arms start from: a file, or the name of a packaged one."""
    steps: int
    """Optimizer steps."""
    evaluation: dict[str, Any] | None
    """Options of `selfgen-ds evaluate`, without the model and the folder; None for a run whose model alone is used."""

    @property
    def name(self) -> str:
        """Name of the run, such as `sft-0`."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """File for all that the run's commands print."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def failure(self) -> Path:
        """File with the reason why the run failed when it was last tried; absent if it did not."""
        return self.folder.with_name(f"{self.name}.failed")

    def failed_at(self) -> int | None:
        """Return when the run failed, in nanoseconds of the file system's clock; None if it did not."""
        return self.failure.stat().st_mtime_ns if self.failure.exists() else None

    @property
    def evaluated(self) -> bool:
        """Whether all commands have ended well."""
        return (self.folder / ".evaluated").exists()

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return (self.folder / ".done").exists()

    def mark(self, name: Literal["evaluated", "done"]) -> None:
        """Record how far the run is."""
        (self.folder / f".{name}").touch()

    @property
    def commands(self) -> list[list[str]]:
        """The commands of `selfgen-ds` that are left to call, in order."""
        if self.evaluated:
            return []
        train = ["train", "--config", self.recipe, "--resume", "auto", *self.settings]
        commands = [] if (self.folder / "model").exists() else [train]
        if self.evaluation is not None:
            own = {"model": str(self.folder / "model"), "output_dir": str(self.folder)}
            commands.append(["evaluate", *as_options(self.evaluation | own)])
        return commands

    @property
    def settings(self) -> list[str]:
        """The options of `train` in which the run departs from its recipe."""
        own = {name: _of_seed(value, self.seed) for name, value in self.arm.settings.items()}
        own |= {"seed": self.seed, "output_dir": str(self.folder)}
        return as_options(own | {"train.max_steps": self.steps})

    def share_done(self) -> float:
        """Return how much of the run is done, as far as its files say, from 0 to 1."""
        if self.evaluated:
            return 1.0
        path = self.folder / "metrics.jsonl"
        taken = path.read_bytes().count(b"\n") if path.exists() else 0
        return _SHARE_OF_TRAINING * min(1.0, taken / self.steps)

    def remove_models(self) -> None:
        """Remove checkpoints, rounds and model of an evaluated run, which can take more space than all else."""
        for name in ("checkpoints", "rollouts", "model"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


_SHARE_OF_TRAINING = 0.9
"""Assumed share of a run's time that its training takes, for the progress shown."""


def as_options(settings: dict[str, Any]) -> list[str]:
    """Return settings as options of the command line."""
    texts = {name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for name, v in settings.items()}
    return [part for name, text in texts.items() for part in (f"--{name}", text)]


def _of_seed(value: Any, seed: int) -> Any:
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value
