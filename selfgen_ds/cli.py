"""The sub-commands: train, inspect, probe, pilot, evaluate, generate, compare, export, bench.

Exit codes: 0 done; 2 bad input or configuration; 3 stopped by a signal after saving; 1 anything else.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
import time
import warnings
from argparse import SUPPRESS
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from tqdm import tqdm

from selfgen_ds import __version__, packaged
from selfgen_ds.config import (
    BenchOptions,
    CompareOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    InspectedRecipe,
    InspectOptions,
    LoraConfig,
    PilotOptions,
    ProbeOptions,
    Recipe,
)
from selfgen_ds.errors import InputError, Problems, RunFailed, Stopped
from selfgen_ds.files import refusal
from selfgen_ds.progress import line_is_open
from selfgen_ds.ranks import signals

log = logging.getLogger("selfgen_ds")

_SETTINGS: dict[str, tuple[type, ...]] = {
    "train": (Recipe,),
    "inspect": (InspectedRecipe, InspectOptions),
    "probe": (Recipe, ProbeOptions),
    "pilot": (Recipe, PilotOptions),
    "bench": (Recipe, BenchOptions),
    "evaluate": (EvaluateOptions,),
    "generate": (GenerateOptions,),
    "export": (ExportOptions,),
}
"""Sub-command -> the dataclasses whose fields are its options. `compare` takes folders instead."""


def main() -> None:
    """Run the sub-command that the command line names.

    Raises:
        SystemExit: The command failed; the exit code is one of those above.
    """
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith("--local_rank="):
        del arguments[0]  # the `deepspeed` launcher puts it before the sub-command; LOCAL_RANK says the same
    os.umask(os.umask(0o077) | 0o002)  # only the owner and the group may write to a run's files
    sys.path.append(os.getcwd())  # finds modules that a recipe names, as `python -m` does
    try:
        parsed = _parse(arguments)
    except InputError as error:
        _tell(str(error))
        sys.exit(2)
    # Torch's stack traces of a broken connection would bury the line that names the lost rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from selfgen_ds.ranks import process_group  # slow imports, which `--help` does not need

    _set_up_logging(process_group.rank())
    try:
        _run(parsed, _overrides(arguments))
    except InputError as error:
        _tell(str(error))
        process_group.leave_process_group(f"error: {error}")
        if "OMPI_COMM_WORLD_SIZE" in os.environ:
            os._exit(2)  # MPI's finalization would wait for ranks that have not failed
        sys.exit(2)
    except KeyboardInterrupt:
        print("selfgen-ds: interrupted", file=sys.stderr)
        os._exit(signals.INTERRUPTED)  # other ranks may be inside a collective, and a clean-up would wait for them
    except Stopped:
        signals.ignore()
        process_group.leave_process_group()
        resumes = arguments[0] != "train" or any(argument.split("=")[0] == "--resume" for argument in arguments)
        again = shlex.join([*arguments, *([] if resumes else ["--resume", "auto"])])
        log.warning("stopped by a signal; everything is saved; start it again by the same launcher, with `%s`", again)
        sys.exit(signals.STOPPED)
    except RunFailed as error:
        _tell(str(error))
        sys.exit(1)
    except Exception as error:
        if process_group.heartbeat is not None:
            signals.ignore()
            process_group.heartbeat.fail(error)
        refused = refusal(error)
        if refused is None:
            raise
        print(f"selfgen-ds: error: {refused}", file=sys.stderr, flush=True)  # another rank's may be another file
        sys.exit(1)
    signals.ignore()
    process_group.leave_process_group()


def _parse(arguments: list[str]) -> Namespace:
    """Return a parsed command line; `bench` has a recipe of its own.

    Raises:
        InputError: One line for every unknown, missing, or mistyped setting.
    """
    command, *options = arguments or [""]
    if not command.startswith("-") and command not in (*_SETTINGS, "compare"):
        expected = f"expected a command ({', '.join(_SETTINGS)}, compare), got {command or 'none'}"
        raise InputError(f"{expected}; `selfgen-ds --help` describes them")
    if arguments[:1] == ["bench"] and not any(a.split("=")[0] in ("--config", "--help", "-h") for a in arguments):
        arguments = ["bench", "--config", "bench", *arguments[1:]]
    parser = _parser()
    try:
        return parser.instantiate(parser.parse_args(arguments))
    except (ArgumentError, TypeError, OSError, UnicodeDecodeError) as error:  # TypeError: a section that is no mapping
        from selfgen_ds.validation.command_line import check_command_line, check_options

        problems = Problems()
        if command in _SETTINGS:
            check_command_line(problems, options, _SETTINGS[command])
        elif command == "compare":
            if not options or options[0].startswith("-"):
                problems.add("runs: missing; give the folders of trained and evaluated runs")
            check_options(problems, options, {"output_dir": str, "metrics": list[str]}, required=["output_dir"])
        problems.raise_all()
        raise InputError(refusal(error) or " ".join(str(error).split())) from error


def _set_up_logging(rank: int) -> None:
    """Log on rank 0, and errors on every rank; keep the warnings of libraries out of the log."""
    time_in_a_file = "" if sys.stderr.isatty() else "%(asctime)s "
    logging.basicConfig(
        format=f"{time_in_a_file}%(levelname)s selfgen-ds: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=logging.WARNING,
        handlers=[_BesideBars()],
    )
    logging.getLogger("selfgen_ds").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    threading.excepthook = _tell_unless_refused


def _tell_unless_refused(failure: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread that has failed.

    Nothing is printed if TensorBoard's thread was refused a file: the main thread raises this error.
    """
    of_tensorboard = type(failure.thread).__name__ == "_AsyncWriterThread"
    if not of_tensorboard or failure.exc_value is None or refusal(failure.exc_value) is None:
        threading.__excepthook__(failure)


class _BesideBars(logging.StreamHandler):
    """Writes log lines between redraws of the progress bars, and never behind a bar on the same line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a log line."""
        with tqdm.external_write_mode(file=sys.stderr):  # clears the bars of a terminal, and draws them again
            if not sys.stderr.isatty() and line_is_open():
                sys.stderr.write("\n")  # in a file, a cleared bar is still there
            super().emit(record)


def _tell(problems: str) -> None:
    """Print problems of the user's input, one line each, on one rank per host."""
    signals.ignore()
    if not sys.stderr.isatty() and line_is_open():
        sys.stderr.write("\n")  # in a file, a progress bar is on this line
    if os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")) == "0":
        sys.stderr.write("".join(f"selfgen-ds: error: {line}\n" for line in problems.splitlines()))
        sys.stderr.flush()
    else:
        # Launchers end all ranks when the first rank ends. Local rank 0 must print before that.
        time.sleep(2)


class _RecipeFile(ActionConfigFile):
    """The option `--config`, which also takes the name of a packaged recipe."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, str(packaged.find(values, "recipes")), option_string)


class _CommandWithRecipe(ArgumentParser):
    """A parser whose `--help` also shows the settings of the section that a recipe may leave out."""

    def format_help(self, *options: Any, **settings: Any) -> str:
        """Return the text of `--help`."""
        section = ArgumentParser(usage=SUPPRESS, add_help=False)
        section.add_class_arguments(LoraConfig, "model.lora")
        return f"{super().format_help(*options, **settings)}\n{section.format_help().lstrip()}"


@cache
def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # `--help` shows the fields' docstrings
    parser = ArgumentParser(
        prog="selfgen-ds",
        exit_on_error=False,
        version=__version__,
        description="Fine-tune causal language models on their own tokens, under DeepSpeed ZeRO-3.",
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(dest="command")

    def command(name: str, summary: str, description: str | None, usage: str | None = None) -> ArgumentParser:
        kind = ArgumentParser if usage is None else _CommandWithRecipe
        added = kind(description=description, usage=usage, exit_on_error=False, allow_abbrev=False)
        commands.add_subcommand(name, added, help=summary)
        if usage is not None:
            config = "recipe: a YAML file, or the name of a packaged one; later options change its settings"
            added.add_argument("--config", action=_RecipeFile, help=config)
        for settings in _SETTINGS.get(name, ()):
            added.add_class_arguments(settings)
        return added

    def command_with_recipe(name: str, summary: str, description: str | None) -> None:
        usage = f"selfgen-ds {name} --config RECIPE [--section.setting VALUE ...]"  # the whole list takes 70 lines
        command(name, summary, f"{description} {packaged_files}", usage)

    packaged_files = f"Packaged recipes: {packaged.names('recipes')}. "
    packaged_files += f"Packaged DeepSpeed JSONs: {packaged.names('ds_configs')}."
    launchers = "under deepspeed, torchrun or mpirun, or in one process"
    command_with_recipe("train", f"train a recipe; {launchers}", "Train a recipe.")
    command_with_recipe("inspect", "show what a recipe's rows become, in one process", InspectOptions.__doc__)
    pilot = "try methods on a part of your data, with a verdict"
    command_with_recipe("pilot", pilot, PilotOptions.__doc__)
    steps = f"take a few steps, save nothing, and print what they cost; {launchers}"
    command_with_recipe("probe", steps, ProbeOptions.__doc__)
    cost = f"measure what training on the model's own tokens costs; {launchers}"
    command_with_recipe("bench", cost, BenchOptions.__doc__)
    command("evaluate", "measure a model on its own prefixes and on the reference's", EvaluateOptions.__doc__)
    command("generate", "answer prompts with a model", GenerateOptions.__doc__)
    command("export", "write a checkpoint as a Hugging Face folder", ExportOptions.__doc__)
    summary = "report what evaluated runs show and cost; the first run is the baseline"
    compare = command("compare", summary, CompareOptions.__doc__)
    compare.add_argument("runs", nargs="+", help="folders of trained and evaluated runs")
    compare.add_argument("--output_dir", required=True, help="folder for the report and its figures")
    names = 'metrics to compare, such as "[rouge_l, recovery_4]"; all by default'
    compare.add_argument("--metrics", type=list[str], default=[], help=names)
    return parser


def _run(parsed: Namespace, overrides: set[str]) -> None:
    """Run a parsed sub-command; only its own modules are imported."""
    options = parsed[parsed.command]
    if parsed.command == "train":
        from selfgen_ds.train import train

        train(_recipe(options, overrides), overrides)
    elif parsed.command == "inspect":
        from selfgen_ds.inspection import inspect

        inspect(_recipe(options, overrides), overrides, options.rows, options.draw)
    elif parsed.command == "pilot":
        from selfgen_ds.pilot.pilot import pilot

        recipe = _recipe(options, overrides)
        pilot(recipe, PilotOptions(**{f.name: getattr(options, f.name) for f in fields(PilotOptions)}))
    elif parsed.command == "probe":
        from selfgen_ds.pilot.probe import probe

        probe(_recipe(options, overrides), overrides, options.steps)
    elif parsed.command == "bench":
        from selfgen_ds.scaling.bench import bench

        bench(_recipe(options, overrides), overrides, options.grid, options.steps)
    elif parsed.command == "evaluate":
        from selfgen_ds import evaluate

        evaluate.run(EvaluateOptions(**vars(options)))
    elif parsed.command == "generate":
        from selfgen_ds import generate

        generate.run(GenerateOptions(**vars(options)))
    elif parsed.command == "compare":
        from selfgen_ds import compare

        compare.run(CompareOptions(**vars(options)))
    else:
        from selfgen_ds.checkpoint.export import export_checkpoint

        export_checkpoint(
            Path(options.checkpoint),
            Path(options.output_dir),
            options.trust_checkpoint,
            options.trust_remote_code,
            options.lora_export,
        )
        print(f"written to {options.output_dir}")


def recipe_of(arguments: list[str], command: str = "train") -> tuple[Recipe, set[str]]:
    """Return the recipe that the options of a command describe, and the settings that the options give, for scripts.

    Raises:
        InputError: One line for every unknown, missing, or mistyped setting.
    """
    given = [a for a in arguments if not a.startswith("--local_rank=")]
    overrides = _overrides(given)
    return _recipe(_parse([command, *given])[command], overrides), overrides


def _overrides(arguments: list[str]) -> set[str]:
    """Return the settings that the command line gives."""
    return {a.removeprefix("--").split("=", 1)[0] for a in arguments if a.startswith("--")}


def _recipe(options: Namespace, overrides: set[str]) -> Recipe:
    """Return the recipe of a command that has one; an option replaces settings of the recipe that it excludes.

    `--model.name_or_path` replaces the recipe's preset and the preset's tokenizer. `--train.max_steps` replaces
    `train.epochs`, and the reverse.
    """
    recipe = Recipe(**{f.name: getattr(options, f.name) for f in fields(Recipe)})
    if "model.name_or_path" in overrides and recipe.model.preset is not None:
        recipe.model.preset = None
        if "model.tokenizer" not in overrides:
            recipe.model.tokenizer = None
    given = overrides & {"train.max_steps", "train.epochs"}
    if given == {"train.max_steps"}:
        recipe.train.epochs = None
    elif given == {"train.epochs"}:
        recipe.train.max_steps = None
    return recipe
