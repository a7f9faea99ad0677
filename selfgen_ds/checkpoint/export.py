"""A Hugging Face folder in safetensors, from a running engine or from a checkpoint's files.

Either way one shard of at most `MAX_SHARD` is in memory at a time, on the host.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from selfgen_ds.checkpoint import checkpoint, unpickling
from selfgen_ds.checkpoint.state_dict_layout import StateDictLayout, plain_tensors
from selfgen_ds.config import LoraConfig, ModelConfig
from selfgen_ds.errors import InputError
from selfgen_ds.files import make_folder
from selfgen_ds.model import lora
from selfgen_ds.model.loading import build_model, from_config

MAX_SHARD = "5GB"


def export_engine(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    adapter: LoraConfig | None = None,
) -> None:
    """Write the engine's model, or its adapter alone; parameters are gathered one by one. Collective."""
    model, writes = engine.module, dist.get_rank() == 0
    with _replacing(folder, writes) as partial:
        if adapter is not None and adapter.export == "adapter":
            trained = {name: _gather(p, writes) for name, p in model.named_parameters() if p.requires_grad}
            if writes:
                lora.save_adapter(model, {n: t for n, t in trained.items() if t is not None}, partial)
        else:
            _write_model(model, partial, writes)
            if writes:
                model.config.save_pretrained(partial)
                model.generation_config.save_pretrained(partial)
        if writes:
            tokenizer.save_pretrained(partial)
    dist.barrier()


def export_checkpoint(path: Path, folder: Path, trust: bool = False) -> None:
    """Write the model of a complete checkpoint, in one process and without a process group.

    Args:
        trust: The checkpoint's files may run code when they are loaded.

    Raises:
        InputError: `path` is no complete checkpoint, not as it was written or may run code, `folder` exists, or the
            model that an adapter was trained on is gone.
    """
    found = next((c for c in checkpoint.complete_checkpoints(path.parent) if c.path == path), None)
    if found is None:
        there = ", ".join(c.path.name for c in checkpoint.complete_checkpoints(path.parent)) or "none"
        raise InputError(f"{path}: no complete checkpoint (with {checkpoint.MARKER}); there are {there}")
    if broken := [name for files in found.files for name in checkpoint.broken_files(found, files)]:
        raise InputError(f"{path}: broken: {', '.join(sorted(broken))}")
    if folder.exists():
        raise InputError(f"{folder}: exists already")
    if not trust and (refusals := unpickling.refused(sorted(path.glob("*.pt")))):
        raise InputError("\n".join(refusals))
    with unpickling.trusting(trust):
        tensors = _saved_tensors(path)
    if (source := checkpoint.adapted_model(path)) is not None:
        _export_adapted(path, folder, tensors, source)
        return
    content = StateDictLayout.read(path)
    with _replacing(folder, writes=True) as partial:
        _write_shards(content, lambda name: tensors[name].contiguous(), partial, writes=True)
        shutil.copytree(path / checkpoint.HF_FOLDER, partial, dirs_exist_ok=True)


def _saved_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a checkpoint's files; some are read when they are used."""
    whole = path / "mp_rank_00_model_states.pt"
    if whole.exists() and not list(path.glob("*_optim_states.pt")):  # stage 0: nothing is sharded
        tensors = unpickling.load(whole, mmap=True)["module"]
    else:
        with redirect_stdout(StringIO()):  # DeepSpeed prints its progress through the files
            tensors = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name, lazy_mode=True)
    return tensors


def _export_adapted(path: Path, folder: Path, tensors: dict[str, Tensor], source: ModelConfig) -> None:
    """Write what the run asked for, of a checkpoint of adapters: these alone, or the model with them added."""
    assert source.lora is not None
    assert source.name_or_path is not None
    config = AutoConfig.from_pretrained(path / checkpoint.HF_FOLDER, trust_remote_code=source.trust_remote_code)
    if merged := source.lora.export == "merged":
        lora.check_base(str(path), source.name_or_path)
        model = build_model(replace(source, attn_implementation="eager"), config)  # which needs no device
    else:
        with torch.device("meta"):
            model = from_config(source, config)
    lora.add_adapter(model, source.lora, source.name_or_path)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapters = {name: tensors[name].contiguous().to(config.dtype) for name in trained}
    with _replacing(folder, writes=True) as partial:
        if merged:
            model.load_state_dict(adapters, strict=False)
            _write_model(model, partial, writes=True)
        else:
            lora.save_adapter(model, adapters, partial)
        # with a model's configuration in it, the adapter's folder would be taken for a whole model
        skipped = shutil.ignore_patterns(*(() if merged else ("config.json", "generation_config.json")))
        shutil.copytree(path / checkpoint.HF_FOLDER, partial, dirs_exist_ok=True, ignore=skipped)


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


def _write_model(model: PreTrainedModel, folder: Path, writes: bool) -> None:
    """The weights of a model, with its adapters added. Collective if it is partitioned."""
    layers, tensors = lora.adapted_layers(model), plain_tensors(model)

    def fetch(name: str) -> Tensor | None:
        wanted = (tensors[name], *(lora.factors_of(layers[name]) if name in layers else ()))
        parts = [part for tensor in wanted if (part := _gather(tensor, writes)) is not None]
        if not parts:
            return None
        return lora.merge(layers[name], *parts) if name in layers else parts[0]

    _write_shards(StateDictLayout.of(model), fetch, folder, writes)


def _write_shards(content: StateDictLayout, fetch: Callable[[str], Tensor | None], folder: Path, writes: bool) -> None:
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


def _gather(tensor: Tensor, writes: bool) -> Tensor | None:
    """The whole tensor, on the host, on the rank that writes; None elsewhere. Collective if it is partitioned."""
    with deepspeed.zero.GatheredParameters([tensor]) if hasattr(tensor, "ds_id") else nullcontext():
        return tensor.detach().cpu().clone() if writes else None
