"""Write checkpoints that count only when they are complete and read back from the disk."""

from __future__ import annotations

import logging
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from selfgen_ds.checkpoint import retention
from selfgen_ds.checkpoint.generators import save_generators
from selfgen_ds.checkpoint.manifest import BROKEN, HF_FOLDER, MARKER, Checkpoint, write_marker
from selfgen_ds.checkpoint.source import Source, write_configs
from selfgen_ds.checkpoint.state_dict_layout import StateDictLayout
from selfgen_ds.checkpoint.storage import Storage
from selfgen_ds.files import intact, naming, refusal, sync_and_sum, sync_folder
from selfgen_ds.ranks import process_group

log = logging.getLogger("selfgen_ds")


_OF_TORCH = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos|cannot be opened|Parent directory")
"""Parts of the messages of torch for a file that it cannot write."""


def required_bytes(parameters: int, dtype: str) -> int:
    """Return the size of a checkpoint: the trained weights, their float32 master weights, and two Adam moments.

    Args:
        parameters: Number of trained parameters.
        dtype: `float32` or `bfloat16`: the dtype of the weights.
    """
    return parameters * ((4 if dtype == "float32" else 2) + 3 * 4)


def save(
    engine: deepspeed.DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    source: Source,
    checkpoint: Checkpoint,
    storage: Storage,
) -> Unverified | None:
    """Write a checkpoint at an optimizer step's boundary. A crash at any moment leaves older checkpoints untouched.

    A complete checkpoint of this step is left as it is: this run has written or loaded it. The checkpoint of a model
    with adapters holds the adapters and the location of the model. Collective: every rank must call this.

    Args:
        config: The configuration that the model was loaded with.
        source: Where the model comes from.
        checkpoint: The content of the manifest, except for the files and `shared`.

    Returns:
        The checkpoint, which does not count before it is verified; None if it was complete before.

    Raises:
        OSError: The checkpoint cannot be written, for example because the disk is full.
    """
    path, folder = checkpoint.path, checkpoint.path.parent
    if any(complete.step == checkpoint.step for complete in storage.complete(folder)):
        return None
    if storage.writes and path.exists():
        retention.remove(path)  # a killed run left it half-written
    dist.barrier()
    try:
        with naming(path):
            _write(engine, path, tokenizer, config, source, storage)
    except dist.DistError:  # another rank is gone, and the disk is not to blame
        raise
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _OF_TORCH.search(str(error)):
            raise
        free, reason = shutil.disk_usage(folder).free, refusal(error) or " ".join(str(error).split())
        raise OSError(f"{path} could not be written, with {free / 1e6:,.1f} MB free there: {reason}") from error
    return Unverified(checkpoint, storage)


class Unverified:
    """A checkpoint that is written, and whose files a thread of each rank reads back from the disk.

    Reading takes about as long as writing, and training need not wait for it.
    """

    def __init__(self, checkpoint: Checkpoint, storage: Storage) -> None:
        self._checkpoint, self._storage = checkpoint, storage
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="verify")
        self._read = thread.submit(_read_back, checkpoint.path, storage)
        thread.shutdown(wait=False)

    def is_read(self) -> bool:
        """Return whether all ranks have read their files. Collective: every rank must call this."""
        return not process_group.max_over_ranks([int(not self._read.done())])[0]

    def complete(self) -> None:
        """Mark the checkpoint as complete, once all ranks have read their files; or as broken, and training goes on.

        Collective: every rank must call this.

        Raises:
            OSError: A file cannot be read or forced to the disk.
        """
        gathered = process_group.all_gather_object(self._read.result())
        path, folder = self._checkpoint.path, self._checkpoint.path.parent
        if damaged := ", ".join(sorted({name for _, names in gathered for name in names})):
            told = "%s reads back from the disk differently than it was written (%s); keeping older checkpoints"
            log.warning(told, path, damaged)
        if self._storage.writes:
            for written_to in (path / HF_FOLDER, folder, folder.parent):
                sync_folder(written_to)
            written = replace(self._checkpoint, files=[files for files, _ in gathered], shared=self._storage.shared)
            write_marker(written, BROKEN if damaged else MARKER)
        dist.barrier()


def _write(
    engine: deepspeed.DeepSpeedEngine,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    source: Source,
    storage: Storage,
) -> None:
    engine.save_checkpoint(str(path.parent), tag=path.name, save_latest=False, exclude_frozen_parameters=True)
    save_generators(path, engine.device)
    if storage.writes:
        write_configs(engine.module, config, source.model.name_or_path, path / HF_FOLDER)
        tokenizer.save_pretrained(path / HF_FOLDER)
        StateDictLayout.of(engine.module).write(path)
        source.of_adapted(engine.module).write(path)


def _read_back(path: Path, storage: Storage) -> tuple[dict[str, list[int]], list[str]]:
    """Force this rank's files of a checkpoint to the disk, and verify them by reading them from there.

    Every file is read twice: from memory for its checksum, and from the disk.

    Returns:
        The files (name -> [bytes, CRC-32]), and the names of those that are damaged.
    """
    files, damaged = {}, []
    for file in path.rglob("*"):
        if not storage.wrote(file.name) or not file.is_file():  # looking up the files of all ranks would take long
            continue
        name = str(file.relative_to(path))
        files[name] = sync_and_sum(file)
        if not intact(file, files[name]):
            damaged.append(name)
    return files, damaged


def record_evaluation(checkpoint: Checkpoint, metrics: dict[str, float], storage: Storage) -> None:
    """Add the step's evaluation to a checkpoint that was saved before the evaluation was done."""
    if storage.writes:
        write_marker(replace(checkpoint, metrics=metrics, unevaluated=None))
