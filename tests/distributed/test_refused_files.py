"""Every file that a command opens is refused once: the command ends with a line that names it, and nothing is lost."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfgen_ds.config import CheckpointConfig, EvalConfig, ModelConfig, SelfgenConfig, TrainConfig, to_yaml
from tests.distributed import runs
from tests.refused_files import Commands, opened, refusing
from tests.tiers import matrix

ERRORS = {
    "r": (errno.EACCES, errno.EIO, errno.EMFILE),
    "w": (errno.ENOSPC, errno.EACCES, errno.EIO, errno.EMFILE),
    "d": (errno.EACCES,),
}
"""Errors of opening a file to read it (r) or to write it (w), and of listing a folder (d)."""


class Place:
    """A folder for one command at a time: `case/` has its inputs and outputs, which it starts from a copy.

    The paths of inputs and outputs are always the same, so that a copied run can be continued.
    """

    def __init__(self, folder: Path, commands: Commands) -> None:
        self.folder, self.case, self._commands = folder, folder / "case", commands

    def begin(self, copy: str) -> None:
        """Start from a copy of a folder, and without the cache."""
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        shutil.copytree(self.folder / copy, self.case)

    def keep(self, name: str) -> None:
        """Keep the case as it is, for `begin`."""
        shutil.copytree(self.case, self.folder / name)

    def run(self, command: str, **variables: str) -> tuple[int, str]:
        """Run a command; return its exit code and its output."""
        run = self.case / "run"
        arguments = {
            "train": ["--config", self.case / "recipe.yaml"],
            "inspect": ["--config", self.case / "recipe.yaml"],
            "evaluate": ["--model", run / "model", "--data", self.case / "rows.jsonl", "--output_dir", run],
            "export": ["--checkpoint", run / "checkpoints" / "step-000002", "--output_dir", self.case / "exported"],
            "compare": [run, "--output_dir", self.case / "compared"],
        }
        log = self.folder / "log"
        variables |= {"TMPDIR": str(self.case / "tmp")}
        code = self._commands.run([command, *map(str, arguments[command])], log, variables)
        return code, log.read_text(encoding="utf-8")

    def files(self, command: str, copy: str) -> list[tuple[str, str]]:
        """Return what a command opens that starts from a copy of a folder: `r`, `w`, or `d`, and a pattern."""
        self.begin(copy)
        log = self.folder / "opened"
        log.unlink(missing_ok=True)
        assert self.run(command, OPENED=str(log))[0] == 0
        own = ("/log", "/opened", "/case/tmp/cc")  # the test's own, and the compiler's
        return sorted(entry for entry in opened(log, self.folder) if not entry[1].startswith(own))

    def model(self) -> bytes:
        """Return the weights that the run has exported."""
        return (self.case / "run" / "model" / "model.safetensors").read_bytes()


def write_inputs(folder: Path) -> None:
    """Write a model, rows, and a recipe of two steps with a round, evaluations, TensorBoard, and two checkpoints."""
    (folder / "tmp").mkdir(parents=True)
    runs.write_rows(folder, 4)
    base = runs.write_model(folder)
    zero = {"zero_optimization": {"stage": 2}}
    board = {"enabled": True, "output_path": str(folder / "board"), "job_name": "run"}
    (folder / "ds.json").write_text(json.dumps(zero | {"tensorboard": board}))
    settings = runs.recipe(
        folder,
        output_dir=str(folder / "run"),
        deepspeed=str(folder / "ds.json"),
        model=ModelConfig(name_or_path=base, dtype="float32"),
        selfgen=SelfgenConfig(method="bash", passes=1),
        train=TrainConfig(max_steps=2, micro_batch_size=1),
        checkpoint=CheckpointConfig(every=1, keep=2),
        eval=EvalConfig(every=2, max_samples=2, batch_size=2),
        resume="auto",
    )
    settings.data.eval, settings.data.packing = settings.data.train, True
    (folder / "recipe.yaml").write_text(to_yaml(settings), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Make the folders `new` (inputs), `trained`, and `evaluated`."""
    folder = tmp_path_factory.mktemp("refused")
    write_inputs(folder / "case")
    commands = Commands(folder, {"HF_DATASETS_CACHE": str(folder / "cache")})
    made = Place(folder, commands)
    made.keep("new")
    for command, name in (("train", "trained"), ("evaluate", "evaluated")):
        code, output = made.run(command)
        assert code == 0, output[-3000:]
        made.keep(name)
    yield made
    commands.stop()


def problem(code: int, output: str, pattern: str) -> str:
    """Return what is wrong with the end of a command for which a file was refused; nothing if it is as it should be."""
    if "Traceback" in output or code not in (0, 1, 2):
        return "a traceback, or an odd exit code"
    told = [line for line in re.split(r"[\r\n]", output) if line.startswith(("selfgen-ds: error: ", "WARNING "))]
    if code and not any(line.startswith("selfgen-ds: error: ") for line in told):
        return "no line"
    names = [part.strip("*.").removesuffix(".partial").split("*")[0] for part in pattern.split("/")[-3:]]
    named = any(name and name in line for name in names for line in told)
    return "" if code == 0 or named else "a line that does not name the file or its folder"


STARTS = {"export": "trained", "evaluate": "trained", "compare": "evaluated", "inspect": "new", "train": "new"}
"""Command -> the folder that it starts from."""


@matrix(("command", "copy"), [*STARTS.items(), ("train", "trained")])
@pytest.mark.timeout(900)
def test_a_file_that_cannot_be_opened_or_written_is_named_in_one_line_and_nothing_is_lost(
    place: Place, command: str, copy: str
) -> None:
    """Each file meets one of the errors. Without the error, a run that has failed continues to the same model."""
    place.begin("trained")
    weights, found = place.model(), []
    for i, (mode, pattern) in enumerate(place.files(command, copy)):
        number = ERRORS[mode][i % len(ERRORS[mode])]
        place.begin(copy)
        code, output = place.run(command, **refusing(mode, f"{place.folder}{pattern}", number))
        wrong = problem(code, output, pattern)
        if command == "train" and not wrong and code and mode == "w" and "/case/run" in pattern:
            code, output = place.run("train")
            wrong = "" if code == 0 else "the run does not continue"
        if command == "train" and code == 0 and place.model() != weights:
            wrong = "another model"
        if wrong:
            found.append(f"{mode} {pattern} {errno.errorcode[number]}: {wrong}: ...{output[-1000:]}")
    assert not found, "\n\n".join(found)


@pytest.mark.slow
def test_an_unreadable_checkpoint_is_passed_over_for_the_one_before(place: Place) -> None:
    for name in ("complete.json", "mp_rank_00_model_states.pt"):
        place.begin("trained")
        newest = place.case / "run" / "checkpoints" / "step-000002"
        output = place.run("train", **refusing("r", str(newest / name), errno.EIO))[1]
        assert f"{newest / name}: Input/output error" in output
        assert re.search(r"resumed from \S+step-000001", output)
