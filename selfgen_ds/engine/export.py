"""A Hugging Face folder in safetensors, from a running engine or from a checkpoint's files.

Either way one shard of at most `MAX_SHARD` is in memory at a time, on the host.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from selfgen_ds.config import InputError
from selfgen_ds.engine import checkpoint

MAX_SHARD = "5GB"


def export_engine(engine: deepspeed.DeepSpeedEngine, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the engine's model; parameters are gathered one by one. Collective. `folder` appears when complete."""
    model = engine.module
    tensors = {**dict(model.named_parameters()), **_persistent_buffers(model)}  # tied weights come once
    shapes = {n: torch.empty(getattr(t, "ds_shape", t.shape), dtype=t.dtype, device="meta") for n, t in tensors.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=MAX_SHARD)
    partial = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    for shard, names in plan.filename_to_tensors.items():
        gathered = {name: full for name in names if (full := _gather(tensors[name])) is not None}
        if dist.get_rank() == 0:
            save_file(gathered, partial / shard, metadata={"format": "pt"})
        del gathered
    if dist.get_rank() == 0:
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def export_checkpoint(path: Path, folder: Path) -> None:
    """Write the model of a complete checkpoint, in one process and without a process group.

    Raises:
        InputError: `path` is no complete checkpoint, or `folder` exists.
    """
    if not (path / checkpoint.MARKER).is_file():
        raise InputError(f"{path}: expected a complete checkpoint (with {checkpoint.MARKER})")
    if folder.exists():
        raise InputError(f"{folder}: exists already")
    config = AutoConfig.from_pretrained(path / checkpoint.HF_FOLDER)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(path / checkpoint.HF_FOLDER, partial)
    with redirect_stdout(StringIO()):  # DeepSpeed prints its progress through the files
        convert_zero_checkpoint_to_state_dict(
            str(path.parent),
            str(partial),
            dtype=config.dtype,
            max_shard_size=MAX_SHARD,
            safe_serialization=True,
            tag=path.name,
        )
    partial.rename(folder)


def _persistent_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    names = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


def _gather(tensor: Tensor) -> Tensor | None:
    """The whole tensor, on the host, on rank 0; None elsewhere."""
    partitioned: Iterable[Tensor] = [tensor] if hasattr(tensor, "ds_id") else []
    with deepspeed.zero.GatheredParameters(partitioned):
        return tensor.detach().cpu().clone() if dist.get_rank() == 0 else None
