"""A Hugging Face folder in safetensors, from a running engine or from a checkpoint's files.

Either way one shard of at most `MAX_SHARD` is in memory at a time, on the host.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfgen_ds.config import InputError
from selfgen_ds.engine import checkpoint
from selfgen_ds.engine.content import Content
from selfgen_ds.files import make_folder

MAX_SHARD = "5GB"


def export_engine(engine: deepspeed.DeepSpeedEngine, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the engine's model; parameters are gathered one by one. Collective."""
    model = engine.module
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    writes = dist.get_rank() == 0
    with _replacing(folder, writes) as partial:
        content = Content.of(model)
        _write_shards(content, lambda name: _gather(tensors[name]), partial, writes)
        if writes:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(partial)
            model.generation_config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    dist.barrier()


def export_checkpoint(path: Path, folder: Path) -> None:
    """Write the model of a complete checkpoint, in one process and without a process group.

    Raises:
        InputError: `path` is no complete checkpoint or not as it was written, or `folder` exists.
    """
    found = next((c for c in checkpoint.complete_checkpoints(path.parent) if c.path == path), None)
    if found is None:
        raise InputError(f"{path}: expected a complete checkpoint (with {checkpoint.MARKER})")
    if broken := [name for rank in range(found.world_size) for name in checkpoint.broken_files(found, rank)]:
        raise InputError(f"{path}: broken: {', '.join(sorted(broken))}")
    if folder.exists():
        raise InputError(f"{folder}: exists already")
    content = Content.read(path)
    whole = path / "mp_rank_00_model_states.pt"
    if whole.exists() and not list(path.glob("*_optim_states.pt")):  # stage 0: nothing is sharded
        tensors = torch.load(whole, mmap=True)["module"]
    else:
        with redirect_stdout(StringIO()):  # DeepSpeed prints its progress through the files
            tensors = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name, lazy_mode=True)
    with _replacing(folder, writes=True) as partial:
        _write_shards(content, lambda name: tensors[name].contiguous(), partial, writes=True)
        shutil.copytree(path / checkpoint.HF_FOLDER, partial, dirs_exist_ok=True)


@contextmanager
def _replacing(folder: Path, writes: bool) -> Iterator[Path]:
    """A folder to fill that takes `folder`'s name when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial, "output_dir")
    yield partial
    if writes:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _write_shards(content: Content, fetch: Callable[[str], Tensor | None], folder: Path, writes: bool) -> None:
    """Safetensors shards of at most `MAX_SHARD`, as `save_pretrained` lays them out.

    Args:
        fetch: Gives a tensor of the model. Called for the same names in the same order on every rank.
        writes: Whether this rank is the one that writes; on others `fetch` may give None.
    """
    groups = content.groups()
    group_of = {name: number for number, group in enumerate(groups) for name in group.stored}
    plan = split_torch_state_dict_into_shards(
        {name: tensor for group in groups for name, tensor in group.stored.items()}, max_shard_size=MAX_SHARD
    )
    for shard, names in plan.filename_to_tensors.items():
        tensors: dict[str, Tensor] = {}
        for number in sorted({group_of[name] for name in names}):  # one that two shards share is fetched for each
            parts = {name: fetch(name) for name in groups[number].tensors}
            if writes:
                stored = content.convert(
                    {name: p.to(content.tensors[name][1]) for name, p in parts.items() if p is not None}
                )
                tensors |= {name: tensor.contiguous() for name, tensor in stored.items() if name in names}
        if writes:
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            (folder / shard).chmod(0o644)  # safetensors leaves it to its owner alone
        del tensors
    if writes and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _gather(tensor: Tensor) -> Tensor | None:
    """The whole tensor, on the host, on rank 0; None elsewhere. Collective."""
    with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
        return tensor.detach().cpu().clone() if dist.get_rank() == 0 else None
