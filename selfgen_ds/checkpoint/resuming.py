"""Find the newest checkpoint that is intact, and load it."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from selfgen_ds import hashing
from selfgen_ds.checkpoint import retention, universal, unpickling
from selfgen_ds.checkpoint.generators import restore_generators
from selfgen_ds.checkpoint.manifest import (
    BROKEN,
    MARKER,
    Checkpoint,
    best_of,
    broken_files,
    half_written,
    mark_newer_broken,
    marked,
)
from selfgen_ds.checkpoint.storage import Storage
from selfgen_ds.errors import InputError
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import raise_on_all_ranks

log = logging.getLogger("selfgen_ds")


def find(folder: Path, storage: Storage) -> Checkpoint | None:
    """Return the newest checkpoint whose files are all as they were written; None if nothing was ever saved.

    Newer checkpoints are marked as broken, and half-written ones are removed. Every rank reads a part of the files.
    Collective: every rank must call this.

    Raises:
        InputError: All checkpoints are broken, or hosts have parts of a checkpoint for another number of ranks.
    """
    complete = storage.complete(folder)
    checkpoint = _newest_intact(complete, folder, storage)
    if checkpoint is None and (saved := _union([str(marker.parent) for marker in marked(folder, MARKER, BROKEN)])):
        raise InputError(storage.explain_nothing_intact(complete, saved))
    if storage.writes:
        retention.remove_all(half_written(folder))
        shutil.rmtree(folder / universal.FOLDER, ignore_errors=True)  # a killed start may have left it
    return checkpoint


def _newest_intact(complete: list[Checkpoint], folder: Path, storage: Storage) -> Checkpoint | None:
    """Return the newest checkpoint that is intact on all hosts, or None. Collective: every rank must call this."""
    for checkpoint in reversed(complete):
        storage.check_world_size(checkpoint)
        if names := _union(broken_files(checkpoint, storage.verified_files(checkpoint))):
            log.warning("%s is broken (%s); trying an older checkpoint", checkpoint.path, ", ".join(names))
            continue
        if storage.writes:
            # This host may have newer checkpoints that another host lacks.
            mark_newer_broken(folder, checkpoint)
        return checkpoint
    return None


def find_best(folder: Path, storage: Storage, metric: str) -> Checkpoint | None:
    """Return the checkpoint with the best evaluation, of those of this number of ranks whose files are as written.

    Collective: every rank must call this.
    """
    candidates = [c for c in storage.complete(folder) if c.world_size == process_group.world_size()]
    while (best := best_of(candidates, metric)) is not None:
        names = _union(broken_files(best, storage.verified_files(best)))
        if not names:
            return best
        log.warning("%s is broken (%s); trying another checkpoint", best.path, ", ".join(names))
        candidates.remove(best)
    return None


def _union(lines: list[str]) -> list[str]:
    """Return the lines of all ranks, sorted, each once. Collective: every rank must call this."""
    return sorted(set().union(*process_group.all_gather_object(lines)))


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint, seed: int, trust: bool = False) -> None:
    """Load a checkpoint that `find` has verified.

    A checkpoint of another number of ranks is converted first. The random generators then start anew, from the seed,
    the step, and the rank. Collective: every rank must call this.

    Args:
        engine: Its JSON needs `checkpoint.load_universal` if another number of ranks wrote ZeRO shards.
        trust: Whether the files may run code while they are loaded.

    Raises:
        InputError: A file holds more than plain data, the disk has no room for the conversion, or the checkpoint cannot
            be divided over these ranks.
    """
    path = checkpoint.path
    # Frozen parameters are not in the files: they stay as they were read from the model's own folder.
    strict = all(parameter.requires_grad for parameter in engine.module.parameters())
    weight_decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    converts = engine.load_universal_checkpoint()
    with unpickling.loading(trust), _failing_on_all_ranks(engine):
        with universal.converted(engine, path) if converts else nullcontext(path.parent) as folder:
            loaded, _ = engine.load_checkpoint(str(folder), tag=path.name, load_module_strict=strict)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed did not load {path}")
        if converts:
            # After a universal load under ZeRO-3 all groups have the first group's decay, and their parameters share
            # one count of steps.
            for group, weight_decay in zip(engine.optimizer.param_groups, weight_decays, strict=True):
                group["weight_decay"] = weight_decay
            for state in engine.optimizer.state.values():
                state["step"] = copy.deepcopy(state["step"])
        # The optimizer has the learning rates of the run that saved it, whose schedule may have been another one.
        schedule = engine.lr_scheduler
        for group, base, factor in zip(
            engine.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(schedule.last_epoch)
        if checkpoint.world_size == dist.get_world_size():
            with raise_on_all_ranks():
                restore_generators(path, engine.device)
        else:
            torch.manual_seed(int(hashing.bits(hashing.GENERATORS, seed, checkpoint.step, dist.get_rank())))


@contextmanager
def _failing_on_all_ranks(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Raise on every rank if one rank cannot load a file: the other ranks would wait for it in a collective.

    Every rank loads the same number of files through `engine.checkpoint_engine`, in the same order.
    """
    if engine._config.zero_config.pipeline_loading_checkpoint:  # ranks load one after the other
        yield
        return
    load = engine.checkpoint_engine.load

    def load_with_all_ranks(*arguments: Any, **settings: Any) -> Any:
        with raise_on_all_ranks():
            return load(*arguments, **settings)

    engine.checkpoint_engine.load = load_with_all_ranks
    try:
        yield
    finally:
        engine.checkpoint_engine.load = load
