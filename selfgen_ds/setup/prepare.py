"""Build a run from a recipe, ready for its first step or for the step after its checkpoint.

`prepare` reads from top to bottom: check the settings, open the run's folder, load the inputs, build the engine,
restore the checkpoint. Everything that can be wrong with recipe, JSON, data, and model is met here, before
the first step.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from selfgen_ds.chat.template import asks_for_date
from selfgen_ds.checkpoint import resuming
from selfgen_ds.checkpoint.export import export_engine
from selfgen_ds.checkpoint.source import Source, inspect_source
from selfgen_ds.config import Recipe, by_name, to_yaml
from selfgen_ds.data.batches import StepBatches
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.samples import Samples, end_tokens, first_rows
from selfgen_ds.data.tokenizer import load_tokenizer, tokenizer_hash
from selfgen_ds.engine.ds_config import zero_stage
from selfgen_ds.errors import InputError, Problems
from selfgen_ds.evaluation.recovery import ForcedError, forced_errors
from selfgen_ds.files import write_atomically
from selfgen_ds.methods.method import AnswerMethod, Method
from selfgen_ds.model import probe
from selfgen_ds.model.attention import masks_packed_rows
from selfgen_ds.model.checksum import weights_checksum
from selfgen_ds.model.generation import stop_at
from selfgen_ds.model.loading import model_config, most_positions
from selfgen_ds.model.policy import EnginePolicy, Sampling
from selfgen_ds.model.probe import Traits
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import check_ranks, raise_on_all_ranks
from selfgen_ds.ranks.heartbeat import StallLimit
from selfgen_ds.rounds.answer_files import AnswerFiles
from selfgen_ds.rounds.command import AnswerCommand
from selfgen_ds.rounds.rounds import Rounds
from selfgen_ds.setup.build import build_engine, engine_policy
from selfgen_ds.setup.inputs import load_method, load_samples, load_step_batches
from selfgen_ds.setup.run_folder import RunFolder, open_run_folder
from selfgen_ds.validation.deepspeed_json import login_problem
from selfgen_ds.validation.inputs import (
    check_activation_checkpointing,
    check_attention,
    check_best,
    check_disk_space,
    check_positions,
    check_quantization,
    check_rounds_folder,
    check_routing,
    check_shares,
    check_steps,
    warn_of_learning_rate,
)
from selfgen_ds.validation.output_folder import check_same_run, recorded_date
from selfgen_ds.validation.settings import check_settings
from selfgen_ds.versions import versions

log = logging.getLogger("selfgen_ds")

# Settings of a method that do not change what a round draws.
_NOT_DRAWN_FROM = {
    "generation_batch_size",
    "generate_command",
    "rollouts",
    "drawn_context_weight",
    "max_equal_share",
    "runaway",
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Loaded and checked inputs of a recipe, without the model's weights."""

    folder: RunFolder
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    traits: Traits
    source: Source
    samples: list[Samples]
    eval_samples: list[TrainingRow]
    """The rows to evaluate on; empty without `data.eval`."""
    forced_errors: dict[int, ForcedError]
    """A forced error for every evaluation row, if the evaluation data are built-in tasks; otherwise empty."""
    end_tokens: list[int]
    """Tokens that each end an answer."""
    step_batches: StepBatches
    """Batches of the training rows; for methods that have rounds, of the rows of the data set itself."""
    method: Method
    total_steps: int
    data_checksum: int
    """Checksum of the training rows: a resumed run must train on the same rows."""


@dataclass(frozen=True, kw_only=True)
class Run(Inputs):
    """Everything that the training loop works with: the inputs, and the objects that are built from them."""

    engine: DeepSpeedEngine
    policy: EnginePolicy
    rounds: Rounds | None
    """For methods that have rounds: the rows that are trained on in place of the data set."""
    hf_config: HfDeepSpeedConfig
    """Kept alive here: transformers asks it whether the model is sharded, but holds only a weak reference to it."""


def prepare(recipe: Recipe, overrides: set[str], poll: Callable[[], None] = lambda: None) -> Run:
    """Check the recipe and everything that it names, then build the run. Collective: every rank must call this.

    Args:
        overrides: Settings that were given on the command line.
        poll: Function that is called on all ranks after every chunk that a round draws.

    Raises:
        InputError: Bad input or configuration, the same lines on every rank.
    """
    recipe.data.date = recipe.data.date or recorded_date(recipe)
    json_config = _check_settings(recipe, overrides)
    process_group.init_process_group()
    assert process_group.heartbeat is not None
    limit = StallLimit(seconds=recipe.train.start_stall_seconds, setting="train.start_stall_seconds")
    process_group.heartbeat.stall_limit = limit
    today = process_group.from_rank_0(lambda: str(date.today()))
    check_ranks(by_name(recipe) | {recipe.deepspeed: json_config} | versions())
    if problem := process_group.from_rank_0(lambda: login_problem(recipe, json_config)):
        raise InputError(problem)
    folder = open_run_folder(recipe, json_config)
    inputs = _load_inputs(recipe, folder, zero_stage(json_config), today)
    engine, hf_config = _build(recipe, json_config, inputs)
    stop_at(engine.module, inputs.end_tokens)
    starting_model = weights_checksum(engine) if inputs.method.as_round_method() is not None else ""
    if folder.resumed is not None:
        resuming.load(engine, folder.resumed, recipe.seed, recipe.trust_checkpoint)
    _log_start(recipe, inputs, engine.module)
    policy = engine_policy(recipe, engine, inputs.end_tokens, inputs.traits.sharing)
    rounds = _open_rounds(recipe, inputs, engine, policy, starting_model, poll)
    if folder.storage.writes:  # nothing is refused after this point
        resolved = {key: value for key, value in hf_config.config.items() if key != "checkpoint"}
        write_atomically(folder.path / "ds_config.json", json.dumps(resolved, indent=2) + "\n")
        write_atomically(folder.path / "config.yaml", to_yaml(recipe))
    return Run(**vars(inputs), engine=engine, policy=policy, rounds=rounds, hf_config=hf_config)


def _check_settings(recipe: Recipe, overrides: set[str]) -> dict[str, Any]:
    """Check recipe and JSON, and return the JSON as it stands."""
    problems = Problems()
    json_config = check_settings(problems, recipe, overrides)
    if problems.lines and json_config:  # the run ends here in any case: report problems of the output folder as well
        check_same_run(problems, recipe, json_config)
    problems.raise_all()
    return json_config


def _load_inputs(recipe: Recipe, folder: RunFolder, stage: int, today: str) -> Inputs:
    """Load tokenizer, model configuration, data, and method, and check each against the recipe.

    The model is checked before any row is tokenized, because tokenizing may take long. Collective: every rank must
    call this.

    Args:
        stage: The ZeRO stage of the DeepSpeed JSON.
        today: Becomes `data.date` if the chat template asks for the date and the recipe does not name one.
    """
    with raise_on_all_ranks():
        tokenizer = load_tokenizer(recipe.model)
        if recipe.data.date is None and asks_for_date(tokenizer):
            recipe.data.date = today
        config = model_config(recipe.model, tokenizer)
        problems = Problems()
        check_positions(problems, recipe, config)
        check_attention(recipe)
        check_quantization(problems, config)
        check_rounds_folder(problems, recipe, folder.storage)
        with problems.collect():  # there may be no such model
            check_disk_space(problems, recipe, config, folder.storage)
        with problems.collect():
            traits = probe.check(recipe.model, config, recipe.data.packing)
            source = inspect_source(problems, recipe.model, config, traits.reach)
            check_routing(problems, traits.reach, stage, process_group.world_size())
            check_activation_checkpointing(problems, recipe, traits, config)
        problems.raise_all()
        warn_of_learning_rate(recipe, config)
        samples, eval_samples = load_samples(problems, recipe, tokenizer)
        check_shares(problems, recipe, samples + eval_samples)
        evaluated = first_rows(eval_samples, recipe.eval.max_samples)
        check_best(problems, recipe, evaluated, tokenizer)
        problems.raise_all()
        step_batches, total_steps, method = _plan(recipe, tokenizer, samples, folder)
    checksum = zlib.crc32(repr([source.checksum for source in samples]).encode())
    check_ranks({"data.train": f"rows with checksum {checksum:08x}"})  # hosts may have files of their own
    if folder.resumed is not None and folder.resumed.data != checksum:
        raise InputError(f"data.train: expected the rows that {folder.resumed.path} was trained on, got other rows")
    return Inputs(
        folder=folder,
        tokenizer=tokenizer,
        config=config,
        traits=traits,
        source=source,
        samples=samples,
        eval_samples=evaluated,
        forced_errors=forced_errors(eval_samples, tokenizer),
        end_tokens=end_tokens(samples + eval_samples, tokenizer),
        step_batches=step_batches,
        method=method,
        total_steps=total_steps,
        data_checksum=checksum,
    )


def _plan(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, samples: list[Samples], folder: RunFolder
) -> tuple[StepBatches, int, Method]:
    """Return the training rows in steps, the number of steps, and the method; report all problems together."""
    problems = Problems()
    with problems.collect():  # without the batches, nothing else can be checked
        step_batches = _in_steps(recipe, samples, folder)
        check_steps(problems, recipe, step_batches)
        total_steps = recipe.train.max_steps or step_batches.steps()
        method = load_method(recipe, tokenizer, samples, step_batches, max(1, total_steps))
    problems.raise_all()
    return step_batches, total_steps, method


def _in_steps(recipe: Recipe, samples: list[Samples], folder: RunFolder) -> StepBatches:
    """Divide the training rows into optimizer steps: a resumed run keeps the rows of a step."""
    world_size = dist.get_world_size()
    shape = recipe.train.shape(world_size)
    return load_step_batches(
        recipe,
        samples,
        step_size=folder.resumed.step_size if folder.resumed else shape.rows,
        micro_batch_size=shape.micro_batch_size,
        rank=dist.get_rank(),
        world_size=world_size,
        epochs=recipe.train.epochs,
    )


def _build(recipe: Recipe, json_config: dict[str, Any], inputs: Inputs) -> tuple[DeepSpeedEngine, HfDeepSpeedConfig]:
    """Build the engine for the present number of ranks and for the checkpoint that the engine will load."""
    folder, batches = inputs.folder, inputs.step_batches
    train = replace(
        recipe.train,
        rows_per_step=None,
        micro_batch_size=batches.micro_batch_size,
        gradient_accumulation_steps=batches.accumulation,
    )
    other_ranks = folder.resumed is not None and folder.resumed.world_size != dist.get_world_size()
    checkpointing = {
        "use_node_local_storage": not folder.storage.shared,
        # At stage 0 every rank loads the same file, whatever the number of ranks.
        "load_universal": other_ranks and zero_stage(json_config) > 0,
    }
    return build_engine(
        replace(recipe, train=train),
        json_config | {"checkpoint": checkpointing},
        inputs.config,
        inputs.traits,
        inputs.tokenizer,
        inputs.total_steps,
    )


def _open_rounds(
    recipe: Recipe,
    inputs: Inputs,
    engine: DeepSpeedEngine,
    policy: EnginePolicy,
    starting_model: str,
    poll: Callable[[], None],
) -> Rounds | None:
    """Return the rounds of the run, or None for a method that has none. Collective: every rank must call this."""
    method, selfgen = inputs.method.as_round_method(), recipe.selfgen
    if method is None:
        return None
    settings = {"method": selfgen.method}
    settings |= {name: getattr(selfgen, name) for name in sorted(method.settings - _NOT_DRAWN_FROM)}
    tokenizer = tokenizer_hash(inputs.tokenizer)[:16]
    with raise_on_all_ranks():
        return Rounds(
            engine=engine,
            policy=policy,
            method=method,
            samples=inputs.samples,
            plain=inputs.step_batches,
            folder=inputs.folder.path / "rollouts",
            shared=None if selfgen.rollouts is None else Path(selfgen.rollouts),
            fingerprint={"model": starting_model, "tokenizer": tokenizer, "data": f"{inputs.data_checksum:08x}"},
            settings=settings | {"seed": recipe.seed, "max_length": recipe.data.max_length},
            step=inputs.folder.first_step,
            command=_answer_command(recipe, inputs, engine),
            poll=poll,
        ).open()


def _answer_command(recipe: Recipe, inputs: Inputs, engine: DeepSpeedEngine) -> AnswerCommand | None:
    """Return the user's command that answers the prompts of rounds; None if the run's own model does."""
    if recipe.selfgen.generate_command is None:
        return None
    assert isinstance(inputs.method, AnswerMethod)  # no other method reads the setting
    closing_ids = [token for source in inputs.samples for token in source.closing_ids]
    files = AnswerFiles(
        tokenizer=inputs.tokenizer,
        sampling=Sampling.of(recipe.selfgen),
        end_tokens=inputs.end_tokens,
        closing_id=next(iter(closing_ids), inputs.tokenizer.eos_token_id),
        vocabulary=inputs.config.get_text_config(decoder=True).vocab_size,
        positions=most_positions(inputs.config),
        seed=recipe.seed,
    )
    source = inputs.source.merging()  # engines read whole models

    def export(folder: Path) -> None:
        export_engine(engine, folder, inputs.tokenizer, inputs.config, source)

    return AnswerCommand(command=recipe.selfgen.generate_command, method=inputs.method, files=files, export=export)


def _log_start(recipe: Recipe, inputs: Inputs, model: nn.Module) -> None:
    batches, world_size = inputs.step_batches, dist.get_world_size()
    resumed = inputs.folder.resumed
    if resumed is not None and resumed.world_size != world_size:
        log.info(
            "resuming a run of %d ranks on %d ranks: a step keeps its %d rows, now as %d micro-batches of %d rows per "
            "rank",
            *(resumed.world_size, world_size, batches.step_size, batches.accumulation),
            batches.micro_batch_size,
        )
    if (idle := world_size - -(-batches.step_size // batches.micro_batch_size)) > 0:
        log.warning("a step has fewer micro-batches than there are ranks: %d ranks have nothing to do", idle)
    log.info(
        "%s on %d samples (%d truncated, %d refused)%s: %d steps of %d rows, %s, %s",
        recipe.selfgen.method,
        sum(map(len, inputs.samples)),
        sum(source.truncated for source in inputs.samples),
        sum(source.refused for source in inputs.samples),
        f" in {len(batches)} packed rows" if recipe.data.packing else "",
        inputs.total_steps,
        batches.step_size,
        "1 rank" if world_size == 1 else f"{world_size} ranks",
        f"resumed from {resumed.path}" if resumed else "from the start",
    )
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]  # ZeRO-3 keeps shards
    every, trained = sum(count for count, _ in counts), sum(count for count, trains in counts if trains)
    whole = sum(pc.sum(source.table.data.column("length")).as_py() for source in inputs.samples)
    if recipe.data.packing and masks_packed_rows(recipe.model.attn_implementation):
        told = "%s reads packed rows through a mask of their length squared; flash and flex attention need none"
        log.info(told, recipe.model.attn_implementation)
    if "replace_probability" in inputs.method.settings:
        log.info("a step's loss is that on the mixed context: it rises with p, and cannot be compared with sft's")
    log.info(
        "%.4g million parameters%s; learning rate %g; %.0f tokens per sample",
        every / 1e6,
        "" if trained == every else f", {trained / 1e6:.4g} million of them trained ({trained / every:.2%})",
        recipe.optim.learning_rate,
        whole / sum(map(len, inputs.samples)),
    )
