"""From a recipe to a run that stands at its first step, or where it was saved.

Everything that can be wrong with recipe, JSON, data and model is met here, before the first step.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from transformers import PretrainedConfig, PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.utils import is_flash_attn_2_available

from selfgen_ds.checkpoint import checkpoint
from selfgen_ds.config import Recipe, to_yaml
from selfgen_ds.data.batches import StepBatches
from selfgen_ds.data.samples import Sample, Samples, end_tokens, take
from selfgen_ds.data.tokenizer import load_tokenizer, tokenizer_hash
from selfgen_ds.engine import ds_config
from selfgen_ds.engine.initialize import initialize, warm_up
from selfgen_ds.errors import InputError
from selfgen_ds.files import write_atomically
from selfgen_ds.methods.method import Method, RoundMethod
from selfgen_ds.model import lora, probe
from selfgen_ds.model.budget import sweep_budget
from selfgen_ds.model.checksum import weights_checksum
from selfgen_ds.model.head import LogitTransform
from selfgen_ds.model.loading import (
    build_model,
    checkpoint_activations,
    model_config,
    trained_parameter_count,
    vocabulary,
)
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import check_ranks, raise_on_all_ranks
from selfgen_ds.ranks.storage import Storage, find_out
from selfgen_ds.rounds.rounds import Fingerprint, Rounds
from selfgen_ds.setup.inputs import (
    check_positions,
    check_settings,
    check_shares,
    load_data,
    load_eval_data,
    load_method,
    load_step_batches,
    sampling,
)
from selfgen_ds.setup.output_folder import flat, open_output
from selfgen_ds.versions import versions

log = logging.getLogger("selfgen_ds")

# What does not change what a round draws.
_NOT_DRAWN_FROM = {"generation_batch_size", "rollouts", "drawn_context_weight", "max_equal_share"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the training loop moves."""

    engine: DeepSpeedEngine
    policy: EnginePolicy
    method: Method
    samples: list[Samples]
    windows: StepBatches
    """Of the data set itself."""
    rounds: Rounds | None
    """Methods that have rounds: what is trained on in place of the data set."""
    tokenizer: PreTrainedTokenizerBase
    eval_samples: list[Sample] | None
    data: int
    """Checksum of the training data."""
    storage: Storage
    total_steps: int
    first_step: int
    """Steps done before this start."""
    resumed: checkpoint.Checkpoint | None
    """What they were read from."""
    lock: IO[str] | None
    """Held on ranks that keep a folder, so that no other run writes to it."""
    hf_config: HfDeepSpeedConfig
    """Transformers looks at it, through a weak reference, to know that the model is sharded."""


def prepare(recipe: Recipe, overrides: set[str], poll: Callable[[], None] = lambda: None) -> Run:
    """Check the recipe and everything it names, then build the run. Collective.

    Args:
        overrides: Settings that were given on the command line.
        poll: Called after every chunk that a round draws, on all ranks.

    Raises:
        InputError: Bad input or configuration, the same on every rank.
    """
    json_config = check_settings(recipe, overrides)
    process_group.init_process_group()
    check_ranks(flat(recipe) | {recipe.deepspeed: json_config} | versions())
    folder, rank, world_size = Path(recipe.output_dir), dist.get_rank(), dist.get_world_size()
    with raise_on_all_ranks():
        folder_lock = open_output(recipe, json_config) if rank == 0 else None
    storage = find_out(folder)
    if not storage.shared:
        log.info("hosts do not share %s: each keeps its ranks' part of the checkpoints", folder)
    with raise_on_all_ranks():
        if storage.writes and rank != 0:
            folder_lock = open_output(recipe, json_config)
    resumed, step_size = None, _step_size(recipe, world_size)
    if recipe.resume == "auto":
        resumed = checkpoint.find(folder / "checkpoints", storage, recipe.trust_checkpoint)
        step_size = resumed.step_size if resumed else step_size
    with raise_on_all_ranks():
        tokenizer = load_tokenizer(recipe.model)
        config = model_config(recipe.model, tokenizer)
        check_positions(recipe, config)
        _check_model(recipe, config, storage)
        form = probe.check(recipe.model, config, recipe.data.packing)
        samples = load_data(recipe, tokenizer)
        check_shares(recipe, samples)
        eval_samples = None
        if recipe.data.eval is not None:
            eval_samples = load_eval_data(recipe, tokenizer)
            check_shares(recipe, eval_samples)
        windows = load_step_batches(
            recipe,
            samples,
            step_size=step_size,
            micro_batch_size=recipe.train.micro_batch_size,
            rank=rank,
            world_size=world_size,
            epochs=recipe.train.epochs,
        )
        total_steps = recipe.train.max_steps or windows.steps()
        if total_steps == 0:
            raise InputError(f"train.epochs: {recipe.train.epochs} of {len(windows)} rows is no row")
        method = load_method(recipe, tokenizer, samples, windows, total_steps)
        size = recipe.selfgen.epochs_per_round * len(windows)
        if isinstance(method, RoundMethod) and size < step_size:
            raise InputError(f"selfgen.epochs_per_round: a round of {size} rows is less than a step of {step_size}")
        if isinstance(method, RoundMethod) and not storage.shared:
            raise InputError(f"output_dir: hosts do not share {folder}; {recipe.selfgen.method} draws rounds into it")
    data = zlib.crc32(repr([source.checksum for source in samples]).encode())
    check_ranks({"data.train": f"rows with checksum {data:08x}"})  # hosts may have files of their own
    if resumed and resumed.data != data:
        raise InputError(f"data.train: not the rows that {resumed.path} was trained on")
    fitted = replace(recipe, train=replace(recipe.train, gradient_accumulation_steps=windows.accumulation))
    checkpointing = {
        "use_node_local_storage": not storage.shared,
        # at stage 0 every rank loads the same file
        "load_universal": bool(resumed and resumed.world_size != world_size and ds_config.stage(json_config) > 0),
    }
    engine, hf_config = build_engine(
        fitted, json_config | {"checkpoint": checkpointing}, config, form, tokenizer, total_steps
    )
    fingerprint = None
    if isinstance(method, RoundMethod):
        fingerprint = Fingerprint(
            model=weights_checksum(engine), tokenizer=tokenizer_hash(tokenizer)[:16], data=f"{data:08x}"
        )
    if resumed:
        checkpoint.load(engine, resumed, recipe.seed, recipe.trust_checkpoint)
        if resumed.world_size != world_size:
            _tell_of_other_ranks(resumed, windows, recipe.train.micro_batch_size)
    log.info(
        "%s on %d samples (%d truncated, %d refused)%s: %d steps of %d rows, %d ranks, %s",
        recipe.selfgen.method,
        sum(map(len, samples)),
        sum(source.truncated for source in samples),
        sum(source.refused for source in samples),
        f" in {len(windows)} packed rows" if recipe.data.packing else "",
        total_steps,
        step_size,
        world_size,
        f"resumed from {resumed.path}" if resumed else "from the start",
    )
    policy = engine_policy(recipe, engine, end_tokens([*samples, *(eval_samples or [])], tokenizer))
    rounds = None
    if isinstance(method, RoundMethod) and fingerprint is not None:
        settings = {name: getattr(recipe.selfgen, name) for name in sorted(method.settings - _NOT_DRAWN_FROM)}
        with raise_on_all_ranks():
            rounds = Rounds(
                engine=engine,
                policy=policy,
                method=method,
                samples=samples,
                windows=windows,
                folder=folder / "rollouts",
                shared=None if recipe.selfgen.rollouts is None else Path(recipe.selfgen.rollouts),
                fingerprint=fingerprint,
                settings={
                    "method": recipe.selfgen.method,
                    **settings,
                    "seed": recipe.seed,
                    "max_length": recipe.data.max_length,
                },
                step=resumed.step if resumed else 0,
                poll=poll,
            )
    if storage.writes:  # nothing is refused from here on
        resolved = {key: value for key, value in hf_config.config.items() if key != "checkpoint"}
        write_atomically(folder / "ds_config.json", json.dumps(resolved, indent=2) + "\n")
        write_atomically(folder / "config.yaml", to_yaml(recipe))
    return Run(
        engine=engine,
        policy=policy,
        method=method,
        samples=samples,
        windows=windows,
        rounds=rounds,
        tokenizer=tokenizer,
        eval_samples=None if eval_samples is None else take(eval_samples, recipe.eval.max_samples),
        data=data,
        storage=storage,
        total_steps=total_steps,
        first_step=resumed.step if resumed else 0,
        resumed=resumed,
        lock=folder_lock,
        hf_config=hf_config,
    )


def _step_size(recipe: Recipe, world_size: int) -> int:
    """Rows of an optimizer step of a run that starts with so many ranks."""
    return recipe.train.micro_batch_size * recipe.train.gradient_accumulation_steps * world_size


def _tell_of_other_ranks(resumed: checkpoint.Checkpoint, windows: StepBatches, micro_batch_size: int) -> None:
    world_size = dist.get_world_size()
    log.info(
        "%d ranks before, %d now: a step keeps its %d rows, as %d micro-batches of %d a rank",
        resumed.world_size,
        world_size,
        windows.step_size,
        windows.accumulation,
        micro_batch_size,
    )
    if (idle := world_size - -(-windows.step_size // micro_batch_size)) > 0:
        log.warning("a step has fewer micro-batches than there are ranks: %d of them have nothing to do", idle)


def build_engine(
    recipe: Recipe,
    json_config: dict[str, Any],
    config: PretrainedConfig,
    form: LogitTransform,
    tokenizer: PreTrainedTokenizerBase,
    total_steps: int,
) -> tuple[DeepSpeedEngine, HfDeepSpeedConfig]:
    """The recipe's model under DeepSpeed, with a valid trace; and the configuration, to be kept. Collective.

    Raises:
        InputError: The model's weights cannot be read.
    """
    hidden_size = config.get_text_config(decoder=True).hidden_size
    hf_config = ds_config.resolve(recipe, json_config, dist.get_world_size(), hidden_size)
    process_group.leave_node_group()
    set_seed(recipe.seed)
    with raise_on_all_ranks():
        model = build_model(recipe.model, config, form, vocabulary(tokenizer))
        if recipe.model.lora is not None:
            set_seed(recipe.seed)
            lora.add_adapter(model, recipe.model.lora, str(recipe.model.name_or_path))
    set_seed(recipe.seed + dist.get_rank())
    if recipe.train.activation_checkpointing:
        checkpoint_activations(model, ds_config.offloads_activations(json_config))
    engine = initialize(model, hf_config.config, recipe.optim, total_steps)
    warm_up(engine)
    return engine, hf_config


def engine_policy(recipe: Recipe, engine: DeepSpeedEngine, end_tokens: list[int]) -> EnginePolicy:
    """The engine's model as methods see it."""
    return EnginePolicy(
        engine,
        engine.module,
        end_tokens=end_tokens,
        sampling=sampling(recipe),
        budget=sweep_budget(
            engine.module.config,
            recipe.train.activation_checkpointing,
            _prefetched(engine),
            recipe.data.max_length if recipe.data.packing else None,
            adapted=recipe.model.lora is not None,
            offloaded=ds_config.offloads_activations(engine.config),
        ),
        generation_batch_size=recipe.selfgen.generation_batch_size,
    )


def _prefetched(engine: DeepSpeedEngine) -> int:
    """Elements that ZeRO-3 gathers ahead of a forward."""
    if engine.zero_optimization_stage() < 3:
        return 0
    return min(int(engine.zero_prefetch_bucket_size()), sum(p.ds_numel for p in engine.module.parameters()))


def _check_model(recipe: Recipe, config: PretrainedConfig, storage: Storage) -> None:
    if recipe.model.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise InputError("model.attn_implementation: flash_attention_2 needs the package flash-attn and a CUDA device")
    folder = Path(recipe.output_dir).absolute()
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    need = checkpoint.required_bytes(trained_parameter_count(recipe.model, config), recipe.model.dtype)
    if not storage.shared:  # every host keeps its ranks' part
        need = need * process_group.local_world_size() // dist.get_world_size()
    room = f"a checkpoint takes {need / 1e6:,.1f} MB, {folder} has {free / 1e6:,.1f} MB free"
    if need > free and not checkpoint.complete_checkpoints(folder / "checkpoints"):
        raise InputError(f"output_dir: {room}")
    if need * (recipe.checkpoint.keep + 2) > free:  # the newest, the best, and the one being written
        log.warning("%s; %d checkpoints may exist at once", room, recipe.checkpoint.keep + 2)
