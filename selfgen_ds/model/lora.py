"""LoRA: low-rank adapters that `peft` puts into a frozen model, in place.

The model stays what it is to everything else: no wrapper around it, the same class, `base_model` and LM head. An
adapted layer `x.q_proj` keeps its weight as `x.q_proj.base_layer.weight` and gets `x.q_proj.lora_A.default.weight`
`[r, in]` and `x.q_proj.lora_B.default.weight` `[out, r]`; what leaves the project has the names of the model or
`peft`'s own.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from selfgen_ds.config import LoraConfig
from selfgen_ds.errors import InputError
from selfgen_ds.files import absolute_folder

_ADAPTER = "default"  # peft's name for the only one


def add_adapter(model: PreTrainedModel, lora: LoraConfig, base: str) -> None:
    """Freeze the model and put adapters into it, in the model's dtype. The new product is 0: nothing changes yet.

    The caller seeds torch, alike on all ranks.

    Args:
        base: Folder or hub id of the model.

    Raises:
        InputError: `target_modules` names no linear layer, or something else.
    """
    targets = lora.target_modules
    if targets == "all-linear":  # peft's own would have routers of experts among them
        head = model.get_output_embeddings()
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
        targets = sorted({name.rpartition(".")[2] for name in linear})
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        base_model_name_or_path=absolute_folder(base),
        task_type=peft.TaskType.CAUSAL_LM,
    )
    try:
        peft.inject_adapter_in_model(config, model, _ADAPTER)
    except (ValueError, re.error) as error:
        raise InputError(f"model.lora.target_modules: {' '.join(str(error).split())}") from error
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        # an adapted embedding's factors are no modules, which ZeRO-3 would not gather
        if type(layer) is not Linear or layer is model.get_output_embeddings():
            raise InputError(f"model.lora.target_modules: expected linear layers below the LM head, got {name}")
    if isinstance(lora.target_modules, list):
        for target in lora.target_modules:
            if not any(f".{name}".endswith(f".{target}") for name in layers):
                raise InputError(f"model.lora.target_modules: the model has no linear layer {target!r}")
    model.register_state_dict_post_hook(_drop_frozen)


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """DeepSpeed leaves frozen parameters out by one name each, and so keeps a tied LM head."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def adapted_layers(model: nn.Module) -> dict[str, Linear]:
    """Adapted layers by the name of their weight in the model without adapters; none if there are no adapters."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


def without_adapters(tensors: dict[str, Tensor], layers: dict[str, Linear]) -> dict[str, Tensor]:
    """The tensors of a model under the names that they have without adapters.

    Args:
        layers: Of `adapted_layers`.
    """
    factors = {id(parameter) for layer in layers.values() for parameter in factors_of(layer)}
    prefixes = {name.removesuffix("weight") for name in layers}
    plain = {}
    for name, tensor in tensors.items():
        if id(tensor) in factors:
            continue
        layer, base, last = name.rpartition("base_layer.")
        plain[layer + last if base and layer in prefixes else name] = tensor
    return plain


def factors_of(layer: Linear) -> tuple[nn.Parameter, nn.Parameter]:
    """A `[r, in]` and B `[out, r]`, partitioned or not."""
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def merge(layer: Linear, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`weight + scale * B A`, summed in float32 and rounded once to the weight's dtype."""
    product = b.float() @ a.float()
    if layer.fan_in_fan_out:
        product = product.T
    return torch.add(weight.float(), product, alpha=layer.scaling[_ADAPTER]).to(weight.dtype)


def save_adapter(model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """`peft`'s adapter folder, without a tokenizer.

    Args:
        tensors: The trained parameters by name.
    """
    named = {f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": t for name, t in tensors.items()}
    save_file(named, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / SAFETENSORS_WEIGHTS_NAME).chmod(0o644)  # safetensors leaves it to its owner alone
    config = copy.copy(model.peft_config[_ADAPTER])
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))


def base_of(name: str) -> str:
    """The model that an adapter folder was trained on; any other name is a model itself.

    Raises:
        InputError: That model is gone, or the folder's configuration is unreadable.
    """
    folder = Path(name)
    if not (folder / CONFIG_NAME).is_file() or (folder / MODEL_CONFIG_NAME).is_file():
        return name
    try:
        base = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{folder / CONFIG_NAME}: not an adapter's configuration") from error
    check_base(str(folder), base)
    return base


def check_base(trained: str, base: str) -> None:
    """Refuse a base model that was a folder and is gone.

    Raises:
        InputError: It is.
    """
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(f"{trained}: the model that it was trained on, {base}, is gone")
