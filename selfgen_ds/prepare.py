"""From a recipe to a run that stands at its first step, or where it was saved.

Everything that can be wrong with recipe, JSON, data and model is met here, before the first step.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
import yaml
from deepspeed import DeepSpeedEngine
from transformers import PretrainedConfig, PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.utils import is_flash_attn_2_available

from selfgen_ds import methods
from selfgen_ds.config import (
    DataConfig,
    InputError,
    Recipe,
    SelfgenConfig,
    Sources,
    problems,
    sources,
    to_yaml,
)
from selfgen_ds.data.batches import Windows
from selfgen_ds.data.correction import Correction, correction
from selfgen_ds.data.packing import load_packs
from selfgen_ds.data.rows import Columns
from selfgen_ds.data.samples import Format, Sample, Samples, end_tokens, load, take
from selfgen_ds.data.tasks import TASKS
from selfgen_ds.data.tokenizer import load_tokenizer, tokenizer_hash
from selfgen_ds.engine import checkpoint, ds_config, launch, lora, probe
from selfgen_ds.engine.budget import sweep_budget
from selfgen_ds.engine.checksum import weights_checksum
from selfgen_ds.engine.model import build_model, model_config, most_positions, trained_parameter_count, vocabulary
from selfgen_ds.engine.policy import EnginePolicy, Sampling
from selfgen_ds.engine.trainer import initialize, warm_up
from selfgen_ds.evaluation.scores import METRICS, RECOVERY_METRICS
from selfgen_ds.files import lock, make_folder, write_atomically
from selfgen_ds.methods.method import Method, Plan, RoundMethod
from selfgen_ds.methods.reject import load_reject
from selfgen_ds.rounds import Fingerprint, Rounds

log = logging.getLogger("selfgen_ds")

# What may change when a run is resumed; everything else would make it another run.
_MAY_CHANGE = ("output_dir", "resume", "train.max_steps", "checkpoint.", "eval.", "selfgen.generation_batch_size")

# What does not change what a round draws.
_NOT_DRAWN_FROM = {"generation_batch_size", "rollouts", "drawn_context_weight"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the training loop moves."""

    engine: DeepSpeedEngine
    policy: EnginePolicy
    method: Method
    samples: list[Samples]
    windows: Windows
    """Of the data set itself."""
    rounds: Rounds | None
    """Methods that have rounds: what is trained on in place of the data set."""
    tokenizer: PreTrainedTokenizerBase
    eval_samples: list[Sample] | None
    data: int
    """Checksum of the training data."""
    total_steps: int
    first_step: int
    """Steps done before this start."""
    lock: IO[str] | None
    """Held on rank 0, so that no other run writes to the folder."""
    hf_config: HfDeepSpeedConfig
    """Transformers looks at it, through a weak reference, to know that the model is sharded."""


def prepare(recipe: Recipe, overrides: set[str]) -> Run:
    """Check the recipe and everything it names, then build the run. Collective.

    Args:
        overrides: Settings that were given on the command line.

    Raises:
        InputError: Bad input or configuration, the same on every rank.
    """
    json_config = check_settings(recipe, overrides)
    launch.init_process_group()
    with _together():
        folder_lock = _open_output(recipe, json_config)
        tokenizer = load_tokenizer(recipe.model)
        config = model_config(recipe.model, tokenizer)
        check_positions(recipe, config)
        _check_model(recipe, config)
        form = probe.check(recipe.model, config, recipe.data.packing)
        samples = load_data(recipe, tokenizer)
        check_shares(recipe, samples)
        eval_samples = None
        if recipe.data.eval is not None:
            eval_samples = load_eval_data(recipe, tokenizer)
            check_shares(recipe, eval_samples)
        windows = load_windows(
            recipe,
            samples,
            micro_batch_size=recipe.train.micro_batch_size,
            accumulation=recipe.train.gradient_accumulation_steps,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            epochs=recipe.train.epochs,
        )
        total_steps = recipe.train.max_steps or windows.steps()
        if total_steps == 0:
            raise InputError(f"train.epochs: {recipe.train.epochs} of {len(windows)} rows is no row")
        method = load_method(recipe, tokenizer, samples, windows, total_steps)
        size = recipe.selfgen.epochs_per_round * len(windows)
        if isinstance(method, RoundMethod) and size < windows.step_size:
            raise InputError(
                f"selfgen.epochs_per_round: a round of {size} rows is less than a step of {windows.step_size}"
            )
    data = _checksum(samples)
    hidden_size = config.get_text_config(decoder=True).hidden_size
    hf_config = ds_config.resolve(recipe, json_config, dist.get_world_size(), hidden_size)
    set_seed(recipe.seed)
    with _together():
        model = build_model(recipe.model, config, form, vocabulary(tokenizer))
        if recipe.model.lora is not None:
            set_seed(recipe.seed)
            lora.add_adapter(model, recipe.model.lora, str(recipe.model.name_or_path))
    set_seed(recipe.seed + dist.get_rank())
    if recipe.train.activation_checkpointing:
        model.activation_checkpointing_enable()
    engine = initialize(model, hf_config.config, recipe.optim, total_steps)
    warm_up(engine)
    folder = Path(recipe.output_dir)
    fingerprint = None
    if isinstance(method, RoundMethod):
        fingerprint = Fingerprint(
            model=weights_checksum(engine), tokenizer=tokenizer_hash(tokenizer)[:16], data=f"{data:08x}"
        )
    resumed = checkpoint.load_newest(engine, folder / "checkpoints", data) if recipe.resume == "auto" else None
    log.info(
        "%s on %d samples (%d truncated, %d refused)%s: %d steps of %d rows, %d ranks, %s",
        recipe.selfgen.method,
        sum(map(len, samples)),
        sum(source.truncated for source in samples),
        sum(source.refused for source in samples),
        f" in {len(windows)} packed rows" if recipe.data.packing else "",
        total_steps,
        windows.step_size,
        dist.get_world_size(),
        f"resumed from {resumed.path}" if resumed else "from the start",
    )
    policy = EnginePolicy(
        engine,
        engine.module,
        end_tokens=end_tokens([*samples, *(eval_samples or [])], tokenizer),
        sampling=sampling(recipe),
        budget=sweep_budget(
            engine.module.config,
            recipe.train.activation_checkpointing,
            _prefetched(engine),
            recipe.data.max_length if recipe.data.packing else None,
            adapted=recipe.model.lora is not None,
        ),
        generation_batch_size=recipe.selfgen.generation_batch_size,
    )
    rounds = None
    if isinstance(method, RoundMethod) and fingerprint is not None:
        settings = {name: getattr(recipe.selfgen, name) for name in sorted(method.settings - _NOT_DRAWN_FROM)}
        with _together():
            rounds = Rounds(
                engine=engine,
                policy=policy,
                method=method,
                samples=samples,
                windows=windows,
                folder=folder / "rollouts",
                shared=None if recipe.selfgen.rollouts is None else Path(recipe.selfgen.rollouts),
                fingerprint=fingerprint,
                settings={"method": recipe.selfgen.method, **settings, "seed": recipe.seed},
            )
    if dist.get_rank() == 0:  # nothing is refused from here on
        write_atomically(folder / "ds_config.json", json.dumps(hf_config.config, indent=2) + "\n")
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
        total_steps=total_steps,
        first_step=resumed.step if resumed else 0,
        lock=folder_lock,
        hf_config=hf_config,
    )


def _prefetched(engine: DeepSpeedEngine) -> int:
    """Elements that ZeRO-3 gathers ahead of a forward."""
    if engine.zero_optimization_stage() < 3:
        return 0
    return min(int(engine.zero_prefetch_bucket_size()), sum(p.ds_numel for p in engine.module.parameters()))


def check_settings(recipe: Recipe, overrides: set[str]) -> dict[str, Any]:
    """All problems of recipe and JSON at once; returns the JSON.

    Raises:
        InputError: A line for every problem.
    """
    found = problems(recipe)
    try:
        found += _unread_settings(recipe.selfgen, overrides)
    except InputError as error:  # no such method
        found.append(str(error))
    for setting, given in {"data.train": recipe.data.train, "data.eval": recipe.data.eval}.items():
        for source in sources(given):
            if source.path.startswith("builtin:") and source.path.removeprefix("builtin:") not in TASKS:
                found.append(f"{setting}: unknown task {source.path!r}; known are builtin:{', builtin:'.join(TASKS)}")
    eval_is_task = all(source.path.startswith("builtin:") for source in sources(recipe.data.eval))
    metrics = METRICS | (RECOVERY_METRICS if eval_is_task else {})
    if recipe.eval.best not in metrics:
        found.append(f"eval.best: expected one of {', '.join(metrics)}, got {recipe.eval.best!r}")
    try:
        load_reject(recipe.selfgen.reject)
    except InputError as error:
        found.append(str(error))
    json_config: dict[str, Any] = {}
    try:
        json_config = ds_config.read(recipe.deepspeed)
        found += ds_config.problems(recipe, json_config, launch.world_size())
    except InputError as error:
        found.append(str(error))
    if found:
        raise InputError("\n".join(dict.fromkeys(found)))
    return json_config


def load_method(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, samples: list[Samples], windows: Windows, total_steps: int
) -> Method:
    """The recipe's method.

    Raises:
        InputError: It cannot work with the recipe's settings or data.
    """
    found = methods.find(recipe.selfgen.method)
    plan = Plan(
        seed=recipe.seed,
        total_steps=total_steps,
        step_size=windows.step_size,
        epoch_size=len(windows),
        micro_batch_size=recipe.train.micro_batch_size,
        max_length=recipe.data.max_length,
        tokenizer=tokenizer,
        correction=correction(samples, tokenizer, recipe.selfgen.cue) if "cue" in found.settings else Correction(),
    )
    method = found(recipe.selfgen, plan)
    if isinstance(method, RoundMethod):
        if recipe.data.packing and not method.keeps_lengths:
            raise InputError(
                f"data.packing: expected false with {recipe.selfgen.method}, whose rows are as long as what the model "
                "draws; data.group_by_length saves padding"
            )
        method.check(samples)
    return method


def _unread_settings(selfgen: SelfgenConfig, overrides: set[str]) -> list[str]:
    """Settings that the method ignores: errors, but for those of a recipe written for another method."""
    read = methods.find(selfgen.method).settings | {"method"}
    changed = [f.name for f in fields(selfgen) if f.name not in read and getattr(selfgen, f.name) != f.default]
    if "selfgen.method" in overrides:
        foreign = [name for name in changed if f"selfgen.{name}" not in overrides]
        changed = [name for name in changed if name not in foreign]
        if foreign:
            log.info("%s does not read the recipe's selfgen.%s", selfgen.method, ", selfgen.".join(foreign))
    return [f"selfgen.{name}: {selfgen.method} does not read it; remove it" for name in changed]


@contextmanager
def _together() -> Iterator[None]:
    """Bad input on one rank is bad input on all of them."""
    mine = None
    try:
        yield
    except InputError as error:
        mine = str(error)
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if lines := dict.fromkeys(line for line in everyone if line):
        raise InputError("\n".join(lines))


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Samples]:
    """The samples of every source of `data.train`.

    Raises:
        InputError: A source cannot be read, a row is not as expected, or none is usable.
    """
    return _load(recipe.data, recipe.data.train, "train", tokenizer, None)


def load_eval_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Samples]:
    """The samples of every source of `data.eval`, `eval.max_samples` in all.

    Raises:
        InputError: As `load_data`.
    """
    assert recipe.data.eval is not None
    return _load(recipe.data, recipe.data.eval, "test", tokenizer, recipe.eval.max_samples)


def _load(
    data: DataConfig, given: Sources, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> list[Samples]:
    columns = Columns(prompt=data.prompt_column, completion=data.completion_column, messages=data.messages_column)
    form = Format(columns=columns, assistant_turns=data.assistant_turns, max_length=data.max_length, limit=limit)
    return load(given, split, tokenizer, form)


def check_shares(recipe: Recipe, samples: list[Samples]) -> None:
    """Refuse data that `data.max_length` does too much harm to.

    Raises:
        InputError: More truncated or refused rows than the recipe allows.
    """
    data = recipe.data
    for source in samples:
        refused = f"prompts leave no room for a response (the first is {source.first_refused})"
        for count, share, setting, what in (
            (source.refused, data.max_refused_share, "max_refused_share", refused),
            (source.truncated, data.max_truncated_share, "max_truncated_share", "responses are cut"),
        ):
            if count > share * source.read:
                raise InputError(
                    f"{source.name}: {count} of {source.read} {what} at data.max_length={data.max_length}; "
                    f"data.{setting}={share} allows fewer"
                )


def load_windows(recipe: Recipe, samples: list[Samples], **shape: Any) -> Windows:
    """The training rows in the recipe's order, packed if it says so.

    Args:
        shape: Of the steps: `micro_batch_size`, `accumulation`, `rank`, `world_size`, `epochs` (see `Windows`).

    Raises:
        InputError: A source's weight is less than one row an epoch.
    """
    weights = [source.weight for source in sources(recipe.data.train) if source.weight is not None]
    return Windows(
        samples,
        packs=[load_packs(source, recipe.data.max_length) for source in samples] if recipe.data.packing else None,
        weights=weights or None,
        group_by_length=recipe.data.group_by_length,
        seed=recipe.seed,
        **shape,
    )


def sampling(recipe: Recipe) -> Sampling:
    """The distribution that tokens are drawn from."""
    selfgen = recipe.selfgen
    return Sampling(temperature=selfgen.temperature, top_p=selfgen.top_p, top_k=selfgen.top_k)


def _checksum(samples: list[Samples]) -> int:
    """Of the training data, the same on all ranks: hosts may have files of their own. Collective."""
    mine = zlib.crc32(repr([source.checksum for source in samples]).encode())
    everyone = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if len(set(everyone)) > 1:
        other = next(rank for rank, value in enumerate(everyone) if value != everyone[0])
        raise InputError(f"data.train: rank {other} has other rows than rank 0")
    return mine


def check_positions(recipe: Recipe, config: PretrainedConfig) -> None:
    """Refuse rows that the model has no positions for.

    Raises:
        InputError: `data.max_length` is more than the model takes.
    """
    positions = most_positions(config)
    if positions is not None and recipe.data.max_length > positions:
        raise InputError(
            f"data.max_length: expected at most the model's {positions} positions, got {recipe.data.max_length}"
        )


def _check_model(recipe: Recipe, config: PretrainedConfig) -> None:
    if recipe.model.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise InputError("model.attn_implementation: flash_attention_2 needs the package flash-attn and a CUDA device")
    folder = Path(recipe.output_dir).absolute()
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    need = checkpoint.required_bytes(trained_parameter_count(recipe.model, config), recipe.model.dtype)
    room = f"a checkpoint takes {need / 1e6:,.1f} MB, {folder} has {free / 1e6:,.1f} MB free"
    if need > free and not checkpoint.complete_checkpoints(folder / "checkpoints"):
        raise InputError(f"output_dir: {room}")
    if need * (recipe.checkpoint.keep + 2) > free:  # the newest, the best, and the one being written
        log.warning("%s; %d checkpoints may exist at once", room, recipe.checkpoint.keep + 2)


def _open_output(recipe: Recipe, json_config: dict[str, Any]) -> IO[str] | None:
    """The folder is new or holds this very run, and rank 0 alone writes to it."""
    if dist.get_rank() != 0:
        return None
    folder = Path(recipe.output_dir)
    make_folder(folder, "output_dir")
    folder_lock = lock(folder, "output_dir")
    _check_output(recipe, json_config, folder)
    return folder_lock


def _check_output(recipe: Recipe, json_config: dict[str, Any], folder: Path) -> None:
    if recipe.model.name_or_path and Path(recipe.model.name_or_path).resolve() == (folder / "model").resolve():
        raise InputError(f"output_dir: {folder / 'model'} is model.name_or_path, and would be replaced")
    written = folder / "config.yaml"
    if not written.exists():
        if foreign := [name for name in ("model", "checkpoints", "metrics.jsonl") if (folder / name).exists()]:
            raise InputError(f"output_dir: {folder} holds {', '.join(foreign)}, but no run's config.yaml")
        return
    if recipe.resume is None:
        raise InputError(f"output_dir: {folder} holds a run already; continue it with --resume auto")
    try:
        # a setting that an older version did not write was at what is its default now
        unset = Recipe(output_dir="", deepspeed="", data=DataConfig(train=""))
        defaults = _flat(yaml.safe_load(to_yaml(unset)))
        before = defaults | _flat(yaml.safe_load(written.read_text(encoding="utf-8")))
    except (yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{written}: not a run's recipe") from error
    now = _flat(yaml.safe_load(to_yaml(recipe)))
    changed = [
        f"{setting} was {before.get(setting)!r} and is {now.get(setting)!r}"
        for setting in sorted(before.keys() | now.keys())
        if before.get(setting) != now.get(setting) and not setting.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise InputError(f"resume: {folder} was started with other settings: {'; '.join(changed)}")
    steps_before, steps = before.get("train.max_steps"), recipe.train.max_steps
    if steps_before is not None and steps is not None and steps < steps_before:
        raise InputError(f"train.max_steps: may be raised on resume, was {steps_before} and is {steps}")
    json_before = json.loads((folder / "ds_config.json").read_text(encoding="utf-8"))
    stage_before, stage = (c.get("zero_optimization", {}).get("stage") for c in (json_before, json_config))
    if stage_before != stage:
        raise InputError(f"resume: {folder} was started with ZeRO stage {stage_before}, not {stage}")


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
