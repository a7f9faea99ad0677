"""Checks of a recipe by itself: ranges of its settings, and settings that contradict each other."""

from __future__ import annotations

import glob
import math
import shlex
import shutil
from dataclasses import asdict, fields
from datetime import date
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

from selfgen_ds.checkpoint.manifest import MARKER
from selfgen_ds.config import EvalConfig, OptimConfig, Recipe, SelfgenConfig
from selfgen_ds.errors import Problems
from selfgen_ds.rounds.command import PLACES
from selfgen_ds.validation.sources import check_sources

# The smallest allowed value of each setting that only has a smallest one.
_LEAST = {
    "seed": 0,
    "data.max_length": 2,
    "selfgen.top_k": 0,
    "selfgen.drawn_context_weight": 0,
    "selfgen.epochs_per_round": 1,
    "selfgen.generation_batch_size": 1,
    "selfgen.answers_per_prompt": 1,
    "selfgen.max_new_tokens": 1,
    "selfgen.max_differing_tokens": 0,
    "selfgen.span_tokens": 1,
    "optim.learning_rate": 0,
    "optim.weight_decay": 0,
    "optim.max_grad_norm": 0,
    "train.max_steps": 1,
    "train.rows_per_step": 1,
    "train.micro_batch_size": 1,
    "train.gradient_accumulation_steps": 1,
    "train.max_nonfinite_steps": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "eval.every": 1,
    "eval.max_samples": 1,
    "eval.batch_size": 1,
    "eval.patience": 1,
    "eval.shown_answers": 0,
}
_SHARES = (
    "data.max_truncated_share",
    "data.max_refused_share",
    "selfgen.replace_probability",
    "selfgen.final_share",
    "selfgen.final_probability",
    "selfgen.clean_share",
    "selfgen.max_differing_share",
    "selfgen.sft_share",
    "selfgen.max_equal_share",
    "optim.warmup_ratio",
    "optim.label_smoothing",
)


def check_recipe(problems: Problems, recipe: Recipe) -> None:
    """Check ranges and contradictions of the recipe's settings, and that the files that it names exist."""
    for setting, least in _LEAST.items():
        value = attrgetter(setting)(recipe)
        problems.expect(value is None or value >= least, setting, f"{least} or more", value)
    for setting in _SHARES:
        value = attrgetter(setting)(recipe)
        problems.expect(0 <= value <= 1, setting, "a number in [0, 1]", value)
    # Torch's and numpy's generators take 32 bits, and every rank adds its number to the seed.
    problems.expect(recipe.seed < 2**31, "seed", f"less than {2**31}", recipe.seed)
    if glob.escape(recipe.output_dir) != recipe.output_dir:
        problems.add(f"output_dir: expected none of *?[ in {recipe.output_dir!r}, which DeepSpeed loads by pattern")
    _check_model(problems, recipe)
    _check_data(problems, recipe)
    _check_selfgen(problems, recipe.selfgen)
    _check_optim_and_train(problems, recipe)


def _check_model(problems: Problems, recipe: Recipe) -> None:
    model = recipe.model
    if model.name_or_path is None:
        needed = "model.name_or_path, or model.preset with model.tokenizer"
        problems.expect(model.preset is not None, "model", needed, None)
        if model.preset is not None:
            needed = "a tokenizer for the preset (`byte` is built in)"
            problems.expect(model.tokenizer is not None, "model.tokenizer", needed, None)
    else:
        check_model_folder(problems, "model.name_or_path", model.name_or_path)
        if (Path(model.name_or_path) / "adapter_config.json").is_file():
            problems.add(
                f"model.name_or_path: {model.name_or_path!r} is an adapter; train a model that it is merged into"
            )
        exported = Path(recipe.output_dir) / "model"
        if Path(model.name_or_path).resolve() == exported.resolve():
            problems.add(f"output_dir: {exported} is model.name_or_path, and would be replaced")
    if model.lora is None:
        return
    needed = "model.name_or_path, since checkpoints hold only what is trained"
    problems.expect(model.name_or_path is not None, "model.lora", needed, asdict(model.lora))
    problems.expect(model.lora.r >= 1, "model.lora.r", "1 or more", model.lora.r)
    problems.expect(model.lora.lora_alpha >= 1, "model.lora.lora_alpha", "1 or more", model.lora.lora_alpha)
    dropout = model.lora.lora_dropout
    problems.expect(0 <= dropout < 1, "model.lora.lora_dropout", "a number in [0, 1)", dropout)
    if model.resize_embeddings:
        problems.add("model.resize_embeddings: expected false with model.lora, which adds no embeddings, got True")


def check_model_folder(problems: Problems, setting: str, name: str) -> None:
    """Check the name of a model that is meant to be a folder; any other name may be a hub id."""
    parent = Path(name).parent
    # A hub id has one slash at most.
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or (parent != Path() and parent.is_dir()):
        problems.expect(Path(name).is_dir(), setting, "an existing folder", name)
    if (Path(name) / MARKER).is_file():
        problems.add(f"{setting}: {name!r} is a checkpoint; `selfgen-ds export` makes a model of it")


def _check_data(problems: Problems, recipe: Recipe) -> None:
    data = recipe.data
    check_sources(problems, "data.train", data.train)
    check_sources(problems, "data.eval", data.eval)
    differ = data.completion_column != data.prompt_column
    problems.expect(differ, "data.completion_column", "another field than data.prompt_column", data.completion_column)
    check_texts(problems, "data.", data.prompt_template, data.date)
    if data.packing and data.group_by_length:
        problems.add("data.group_by_length: expected false with data.packing, whose rows are all full")
    if recipe.wandb_project is not None and find_spec("wandb") is None:
        problems.add("wandb_project: the package wandb is not installed (pip install 'selfgen-ds[wandb]')")
    temperatures = recipe.eval.sample_temperatures
    problems.expect(all(t > 0 for t in temperatures), "eval.sample_temperatures", "numbers above 0", temperatures)
    problems.expect(
        len(set(temperatures)) == len(temperatures), "eval.sample_temperatures", "every value once", temperatures
    )
    if recipe.eval.patience is not None and recipe.eval.every is None:
        problems.add("eval.patience: expected eval.every as well")
    if data.eval is None:
        for field in fields(EvalConfig):
            value, default = (getattr(config, field.name) for config in (recipe.eval, EvalConfig()))
            problems.expect(value == default, f"eval.{field.name}", "data.eval to be given as well", value)


def check_texts(problems: Problems, section: str, prompt_template: str, day: str | None) -> None:
    """Check the settings of the texts that rows become.

    Args:
        section: Stands before the names of the settings in problems.
    """
    holds = "{prompt}" in prompt_template
    problems.expect(holds, f"{section}prompt_template", "a text with {prompt} in it", prompt_template)
    try:
        date.fromisoformat(day or "2026-01-31")
    except ValueError:
        problems.add(f"{section}date: expected a day such as 2026-01-31, got {day!r}")


def _check_selfgen(problems: Problems, selfgen: SelfgenConfig) -> None:
    weight = selfgen.drawn_context_weight
    problems.expect(weight <= 1e6, "selfgen.drawn_context_weight", "1000000 or less", weight)
    passes = selfgen.passes
    holds = passes is None or isinstance(passes, str) or passes >= 1
    problems.expect(holds, "selfgen.passes", "1 or more, or exact", passes)
    problems.expect(selfgen.temperature > 0, "selfgen.temperature", "more than 0", selfgen.temperature)
    problems.expect(0 < selfgen.top_p <= 1, "selfgen.top_p", "a probability mass in (0, 1]", selfgen.top_p)
    share = selfgen.schedule_share
    problems.expect(0 < share <= 1, "selfgen.schedule_share", "a share in (0, 1]", share)
    if selfgen.schedule == "constant" and share != SelfgenConfig.schedule_share:
        problems.add("selfgen.schedule_share: has no effect with selfgen.schedule: constant; remove one of the two")
    if selfgen.final_probability and not selfgen.final_share:
        problems.add("selfgen.final_probability: expected selfgen.final_share as well")
    if selfgen.generate_command is not None:
        _check_command(problems, selfgen.generate_command)
    if (selfgen.position == "span") != (selfgen.span_tokens is not None):
        problems.add("selfgen.span_tokens: expected with selfgen.position: span, and only then")


def _check_command(problems: Problems, command: str) -> None:
    """Check that the command names all that it has to read and write, and that this host has its program."""
    try:
        words = shlex.split(command)
    except ValueError as error:  # a quotation mark that nothing closes
        problems.add(f"selfgen.generate_command: {error} in {command!r}")
        return
    named = all(any(place in word for word in words) for place in PLACES)
    problems.expect(named, "selfgen.generate_command", f"a command with {', '.join(PLACES)} in it", command)
    if words and shutil.which(words[0]) is None:
        problems.add(f"selfgen.generate_command: this host has no program {words[0]!r}")


def _check_optim_and_train(problems: Problems, recipe: Recipe) -> None:
    optim, train = recipe.optim, recipe.train
    problems.expect(optim.epsilon > 0, "optim.epsilon", "more than 0", optim.epsilon)
    problems.expect(all(0 <= beta < 1 for beta in optim.betas), "optim.betas", "two numbers in [0, 1)", optim.betas)
    if optim.loss == "dft" and optim.label_smoothing:
        problems.add("optim.label_smoothing: expected 0 with optim.loss: dft")
    is_share = 0 < optim.dft_share <= 1
    problems.expect(is_share, "optim.dft_share", "a share in (0, 1]", optim.dft_share)
    if is_share and optim.loss != "dft" and optim.dft_share != OptimConfig.dft_share:
        problems.add("optim.dft_share: expected optim.loss: dft as well")
    if train.rows_per_step is None and train.micro_batch_size is None:
        problems.add("train: expected rows_per_step, the rows of a step on any number of ranks, or micro_batch_size")
    if train.rows_per_step is not None and train.gradient_accumulation_steps != 1:
        given = train.gradient_accumulation_steps
        problems.add(f"train.gradient_accumulation_steps: follows from train.rows_per_step; remove it, got {given}")
    if (train.epochs is None) == (train.max_steps is None):
        problems.add(f"train: expected either epochs or max_steps, got {train.epochs} and {train.max_steps}")
    epochs = train.epochs
    problems.expect(epochs is None or 0 < epochs < math.inf, "train.epochs", "a number more than 0", epochs)
    limits = {
        "train.stall_seconds": train.stall_seconds,
        "train.start_stall_seconds": train.start_stall_seconds,
        "checkpoint.stall_seconds": recipe.checkpoint.stall_seconds,
    }
    for name, seconds in limits.items():
        problems.expect(seconds > 0, name, "more than 0", seconds)
