"""Checks of a recipe against what it names: the model's configuration, the tokenized data, the method."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from selfgen_ds import methods
from selfgen_ds.checkpoint import manifest, saving
from selfgen_ds.checkpoint.storage import Storage
from selfgen_ds.config import Recipe
from selfgen_ds.data.batches import StepBatches
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.samples import Samples
from selfgen_ds.errors import InputError, Problems
from selfgen_ds.evaluation.text_metrics import is_counted
from selfgen_ds.model import attention
from selfgen_ds.model.loading import most_positions, parameter_count, trained_parameter_count
from selfgen_ds.model.probe import Traits
from selfgen_ds.model.reach import Reach

log = logging.getLogger("selfgen_ds")

_SMALL_MODEL = 20_000_000  # parameters; smaller models are trained at high learning rates


def check_positions(problems: Problems, recipe: Recipe, config: PretrainedConfig) -> None:
    """Check that the model has a position for every token of the longest row."""
    positions = most_positions(config)
    holds = positions is None or recipe.data.max_length <= positions
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", positions)
    limit = f"at most the model's {positions} positions"
    if positions != longest:
        limit += f" before LongRoPE changes them (a batch with a longer row would change the others; {longest} in all)"
    problems.expect(holds, "data.max_length", limit, recipe.data.max_length)


def check_attention(recipe: Recipe) -> None:
    """Check that the attention of the recipe can run here, before a model is built with it to be tried.

    Raises:
        InputError: It cannot.
    """
    told = attention.problem(recipe.model.attn_implementation, get_accelerator().device_name() == "cpu", trains=True)
    if told:
        raise InputError(f"model.attn_implementation: {told}")


def check_quantization(problems: Problems, config: PretrainedConfig) -> None:
    """Check that the model's weights are numbers that an optimizer can change."""
    quantization = config.to_dict().get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "of an unknown method")
        problems.add(
            f"model.name_or_path: the model is quantized ({method}); name an unquantized one, in float32 or bfloat16"
        )


def check_activation_checkpointing(
    problems: Problems, recipe: Recipe, traits: Traits, config: PretrainedConfig
) -> None:
    """Check that the model type has activation checkpointing if the recipe asks for it."""
    if recipe.train.activation_checkpointing and not traits.checkpoints_activations:
        problems.add(f"train.activation_checkpointing: expected false: model type {config.model_type!r} has none")


def check_routing(problems: Problems, reach: Reach, stage: int, world_size: int) -> None:
    """Check that ZeRO can train modules whose parts run for some rows only, so that ranks use different parameters.

    At stage 3 all parts of such a module are gathered with it. At stages 1 and 2 DeepSpeed sums the gradients of
    different parameters.

    Args:
        stage: The ZeRO stage of the DeepSpeed JSON.
    """
    skips_layers = [name for name in reach.routing if not re.search(r"\.\d+(\.|$)", name)]
    if not reach.routing or stage == 0 or world_size == 1 or (stage == 3 and not skips_layers):
        return
    remedy = "stage 0" if skips_layers else "stage 3 or 0"
    problems.add(
        f"zero_optimization.stage: expected {remedy}, got {stage}: {(skips_layers or reach.routing)[0] or 'the model'} "
        "runs parts of itself for some rows only (experts or layers), so that the ranks use different parameters"
    )


def check_disk_space(problems: Problems, recipe: Recipe, config: PretrainedConfig, storage: Storage) -> None:
    """Refuse a run whose first checkpoint does not fit on the disk, and warn if later checkpoints do not fit."""
    folder = Path(recipe.output_dir).absolute()
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    checkpoint_size = saving.required_bytes(trained_parameter_count(recipe.model, config), recipe.model.dtype)
    need = storage.bytes_per_host(checkpoint_size)
    room = f"a checkpoint takes {need / 1e6:,.1f} MB, and {folder} has {free / 1e6:,.1f} MB free"
    if need > free and not manifest.complete_checkpoints(folder / "checkpoints"):
        problems.add(f"output_dir: {room}")
    if need * (recipe.checkpoint.keep + 2) > free:  # the newest ones, the best one, and the one being written
        log.warning("%s; %d checkpoints may exist at once", room, recipe.checkpoint.keep + 2)


def warn_of_learning_rate(recipe: Recipe, config: PretrainedConfig) -> None:
    """Name a learning rate that suits a model from scratch if a pretrained model of some size is trained."""
    model, rate = recipe.model, recipe.optim.learning_rate
    usual = 2e-4 if model.lora is None else 2e-3
    if model.name_or_path is not None and rate > usual and parameter_count(model, config) > _SMALL_MODEL:
        log.warning(
            "optim.learning_rate: %g suits a model from scratch, and a pretrained model may forget what it knows; "
            "fine-tuning usually takes 1e-6 to 1e-4, and with model.lora 1e-5 to 1e-3",
            rate,
        )


def check_rounds_folder(problems: Problems, recipe: Recipe, storage: Storage) -> None:
    """Check that all hosts can read the rounds that other hosts draw, if the method has rounds."""
    if methods.find(recipe.selfgen.method).has_rounds and not storage.shared:
        problems.add(
            f"output_dir: expected a folder that all hosts share, because {recipe.selfgen.method} writes rounds there; "
            f"the hosts do not share {recipe.output_dir}"
        )


def check_shares(problems: Problems, recipe: Recipe, samples: list[Samples]) -> None:
    """Refuse data of which a larger share of rows is cut or cannot be used than the recipe allows."""
    data = recipe.data
    for source in samples:
        if source.refused > data.max_refused_share * source.read:
            remedy = f"allow more than {data.max_refused_share:.1%} of the rows (data.max_refused_share)"
            if source.too_long:
                remedy = f"raise data.max_length={data.max_length}, or {remedy}"
            problems.add(*source.why_refused(f"mend them, or {remedy}"))
        elif source.refused:
            log.warning("%s", "\n".join(source.why_refused("they are left out")))
        if source.truncated > data.max_truncated_share * source.read:
            problems.add(
                f"{source.name}: {source.truncated} of {source.read} responses are cut at "
                f"data.max_length={data.max_length}; raise data.max_length, or allow more than "
                f"{data.max_truncated_share:.1%} of the rows (data.max_truncated_share)"
            )


def check_rows(problems: Problems, samples: list[Samples], most: float) -> None:
    """Check that rows can be used, but for rows that are too long, which `evaluate` leaves out and counts.

    Args:
        most: The largest share of rows that may be of no use for another reason.
    """
    for source in samples:
        if source.refused - len(source.too_long) > most * source.read:
            remedy = f"mend them, or allow more than {most:.1%} of the rows (--max_refused_share)"
            problems.add(*source.why_refused(remedy))
        elif source.refused:
            log.warning("%s", "\n".join(source.why_refused("they are left out")))


def check_best(problems: Problems, recipe: Recipe, rows: list[TrainingRow], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the metric `eval.best` says something of some of the evaluation rows."""
    metric = recipe.eval.best
    references = (tokenizer.decode(row.response_ids, skip_special_tokens=True) for row in rows)
    if rows and not any(is_counted(metric, reference) for reference in references):
        need = "a final answer (`####`, a box, or a number)" if metric == "final_answer" else "two words"
        problems.add(f"eval.best: {metric} needs references with {need}, and no row of data.eval has one")


def check_steps(problems: Problems, recipe: Recipe, step_batches: StepBatches) -> None:
    """Check that a run is at least one step, and that a round is, if the method has rounds."""
    train, rows, step_size = recipe.train, len(step_batches), step_batches.step_size
    if train.max_steps is None and step_batches.steps() == 0:
        problems.add(f"train.epochs: {train.epochs} epochs of {rows} rows contain no whole row; raise train.epochs")
    rows_per_round = recipe.selfgen.epochs_per_round * rows
    if methods.find(recipe.selfgen.method).has_rounds and rows_per_round < step_size:
        problems.add(
            f"selfgen.epochs_per_round: a round of {rows_per_round} rows is less than a step of {step_size}; raise it, "
            "or lower train.rows_per_step, train.micro_batch_size or train.gradient_accumulation_steps"
        )
