"""Export a model as a Hugging Face folder in safetensors, from a running engine or from a checkpoint's files.

Host memory holds one shard of at most `MAX_SHARD` at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from selfgen_ds.checkpoint import unpickling
from selfgen_ds.checkpoint.manifest import HF_FOLDER, MARKER, broken_files, complete_checkpoints
from selfgen_ds.checkpoint.source import Source, write_configs
from selfgen_ds.checkpoint.source_tensors import SourceTensors
from selfgen_ds.checkpoint.state_dict_layout import StateDictLayout, plain_tensors
from selfgen_ds.errors import InputError
from selfgen_ds.files import make_folder, naming
from selfgen_ds.model import lora
from selfgen_ds.model.gathering import gather_copy, is_finite
from selfgen_ds.model.loading import build_model, from_config
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import raise_on_all_ranks

MAX_SHARD = "5GB"


def export_engine(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    source: Source,
) -> None:
    """Write the engine's model. Rank 0 writes; ZeRO-3's parameters are gathered one by one.

    Collective: every rank must call this.

    Args:
        config: The configuration that the model was loaded with.
        source: Where the model comes from. With `lora.export: adapter` the adapters alone are written.

    Raises:
        InputError: The folder that the model comes from no longer exists, and the export copies tensors from it.
        RuntimeError: A trained weight is not finite.
    """
    model, writes = engine.module, dist.get_rank() == 0
    _check_finite(model)
    with _replacing(folder, writes) as partial:
        if source.model.lora is not None and source.model.lora.export == "adapter":
            trained = {name: gather_copy(p, writes) for name, p in model.named_parameters() if p.requires_grad}
            if writes:
                lora.save_adapter(model, {n: t for n, t in trained.items() if t is not None}, partial)
                model.generation_config.to_json_file(partial / GENERATION_CONFIG_NAME, use_diff=True)
        else:
            with raise_on_all_ranks():
                originals = source.tensors()
            _write_model(model, partial, writes, source, originals)
            if writes:
                write_configs(model, config, source.model.name_or_path, partial)
        if writes:
            tokenizer.save_pretrained(partial)
    dist.barrier()


def _check_finite(model: PreTrainedModel) -> None:
    """Check the trained weights of all ranks, each rank its own shards. Collective: every rank must call this."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    broken = [name for name, parameter in trained.items() if not is_finite(_own_part(parameter))]
    if names := sorted({name for names in process_group.all_gather_object(broken[:1]) for name in names}):
        raise RuntimeError(
            f"trained weights are not finite, the first are in {names[0]}: the model is not exported; resume from an "
            "older checkpoint with a lower optim.learning_rate"
        )


def _own_part(parameter: Any) -> Tensor:
    """Return the part of a parameter that this rank holds, without the padding of the last shard, which is not set."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    shard = parameter.ds_tensor
    return shard[: max(0, parameter.ds_numel - parameter.ds_zero_partition_rank * shard.ds_numel)]


def export_checkpoint(
    path: Path,
    folder: Path,
    trust: bool = False,
    trust_remote_code: bool = False,
    lora_export: Literal["merged", "adapter"] | None = None,
) -> None:
    """Write the model of a complete checkpoint, in one process and without a process group.

    Args:
        trust: Whether the checkpoint's files may run code when they are loaded.
        trust_remote_code: Whether code that the model brings in its own folder may run.
        lora_export: Form in which adapters are written; None means that of the run.

    Raises:
        InputError: `path` is no complete checkpoint, one of its files is not as it was written or holds more than plain
            data, the model's own code may not run, `folder` exists, the checkpoint has no adapters to write, or an
            adapter's base model no longer exists.
    """
    if of_run := complete_checkpoints(path / "checkpoints"):
        raise InputError(f"{path}: expected a checkpoint, got a run; its newest checkpoint is {of_run[-1].path}")
    complete = complete_checkpoints(path.parent)
    checkpoint = next((c for c in complete if c.path == path), None)
    if checkpoint is None:
        names = ", ".join(c.path.name for c in complete) or "none"
        raise InputError(f"{path}: expected a complete checkpoint (with {MARKER}); complete are: {names}")
    if broken := [name for files in checkpoint.files for name in broken_files(checkpoint, files)]:
        names = ", ".join(sorted(broken))
        raise InputError(f"{path}: {names}: not as written; export another checkpoint")
    if folder.exists():
        raise InputError(f"{folder}: already exists; choose a new folder")
    with unpickling.loading(trust):
        tensors = _saved_tensors(path)
    source = Source.read(path)
    config = _saved_config(path, trust_remote_code)
    if (adapter := source.model.lora) is not None:
        adapter = replace(adapter, export=lora_export or adapter.export)
        model = replace(source.model, lora=adapter, trust_remote_code=trust_remote_code)
        _export_adapted(path, folder, tensors, replace(source, model=model), config)
        return
    if lora_export is not None:
        raise InputError(f"--lora_export: {path} has no adapters; remove the option")
    layout, originals = StateDictLayout.read(path, config, trust_remote_code), source.tensors()
    with _replacing(folder, writes=True) as partial:
        _write_shards(layout, lambda name: tensors[name].contiguous(), partial, True, source, originals)
        _copy_files(path / HF_FOLDER, partial)


def _saved_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a checkpoint's files by their names in the model; the data may be read from disk later."""
    unsharded = path / "mp_rank_00_model_states.pt"
    if unsharded.exists() and not list(path.glob("*_optim_states.pt")):  # stage 0
        return unpickling.load(unsharded, mmap=True)["module"]
    with redirect_stdout(StringIO()):  # DeepSpeed prints which file it reads
        return get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name, lazy_mode=True)


def _saved_config(path: Path, trust_remote_code: bool) -> PretrainedConfig:
    """Return the configuration of a checkpoint's model.

    Raises:
        InputError: The model brings its own code, which may not run.
    """
    content = json.loads((path / HF_FOLDER / CONFIG_NAME).read_text(encoding="utf-8"))
    if "auto_map" in content and not trust_remote_code:
        raise InputError(f"{path}: the model brings its own code; --trust_remote_code true lets it run")
    return AutoConfig.from_pretrained(path / HF_FOLDER, trust_remote_code=trust_remote_code)


def _export_adapted(
    path: Path, folder: Path, tensors: dict[str, Tensor], source: Source, config: PretrainedConfig
) -> None:
    """Write the model of a checkpoint that holds adapters: the adapters alone, or the model with them merged."""
    base = source.model
    assert base.lora is not None
    assert base.name_or_path is not None
    if merged := base.lora.export == "merged":
        lora.check_base(str(path), base.name_or_path)
        # "eager" exists on every device; the model is not run.
        model = build_model(replace(base, attn_implementation="eager"), config)
    else:
        with torch.device("meta"):
            model = from_config(base, config)
    lora.add_adapter(model, base.lora, base.name_or_path)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapters = {name: tensors[name].contiguous().to(config.dtype) for name in trained}
    with _replacing(folder, writes=True) as partial:
        if merged:
            model.load_state_dict(adapters, strict=False)
            _write_model(model, partial, True, source, source.tensors())
        else:
            lora.save_adapter(model, adapters, partial)
        # With a model's configuration in it, the adapter's folder would be taken for a whole model.
        _copy_files(path / HF_FOLDER, partial, *(() if merged else (CONFIG_NAME,)))


def _copy_files(source: Path, target: Path, *without: str) -> None:
    """Copy the files of a folder, but for some names. `shutil.copytree` would raise a list of errors."""
    for file in sorted(source.iterdir()):
        if file.name not in without:
            shutil.copy(file, target)


@contextmanager
def _replacing(folder: Path, writes: bool) -> Iterator[Path]:
    """Yield a folder to fill, and give it the name `folder` when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial, "output_dir")
    with naming(folder):
        yield partial
    if writes:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _write_model(
    model: PreTrainedModel, folder: Path, writes: bool, source: Source, originals: SourceTensors | None
) -> None:
    """Write the weights of a model, with its adapters merged.

    Collective if the model is partitioned: every rank must call this.
    """
    layers, tensors = lora.adapted_layers(model), plain_tensors(model)

    def fetch(name: str) -> Tensor | None:
        partitioned = (tensors[name], *(lora.factors_of(layers[name]) if name in layers else ()))
        parts = [part for tensor in partitioned if (part := gather_copy(tensor, writes)) is not None]
        if not parts:
            return None
        return lora.merge(layers[name], *parts) if name in layers else parts[0]

    _write_shards(StateDictLayout.of(model), fetch, folder, writes, source, originals)


def _write_shards(
    layout: StateDictLayout,
    fetch: Callable[[str], Tensor | None],
    folder: Path,
    writes: bool,
    source: Source,
    originals: SourceTensors | None,
) -> None:
    """Write safetensors shards of at most `MAX_SHARD`, laid out as `save_pretrained` does.

    Args:
        fetch: Returns a tensor of the model; called for the same names in the same order on every rank.
        writes: Whether this rank writes. On a rank that does not, `fetch` may return None.
        source: Its tensors `kept` are copied as they are, whether the model has them or not; its names are kept, too.
        originals: The tensors to copy from; None if there are none.
    """
    groups = [(names, source.names(stored)) for names, stored in layout.groups()]
    groups = [(names, stored) for names, stored in groups if not set(stored) <= set(source.kept)]
    group_of = {name: number for number, (_, stored) in enumerate(groups) for name in stored}
    copied = {name: originals.headers[name] for name in source.kept} if originals else {}
    # Parts of one joined tensor are views, each of which would count as the whole.
    sizes = {name: torch.empty_like(t) for _, stored in groups for name, t in stored.items()} | copied
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=MAX_SHARD)
    for shard, names in plan.filename_to_tensors.items():
        tensors = {name: originals.read(name) for name in names if name in copied} if originals and writes else {}
        for number in sorted({group_of[n] for n in names if n not in copied}):  # a group in two shards is fetched twice
            parts = {name: fetch(name) for name in groups[number][0]}
            if writes:
                stored = source.names(
                    layout.convert({name: p.to(layout.tensors[name][1]) for name, p in parts.items() if p is not None})
                )
                tensors |= {name: tensor.contiguous() for name, tensor in stored.items() if name in names}
        if writes:
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            (folder / shard).chmod(0o644)  # safetensors makes a file that only its owner can read
        del tensors
    if writes and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
