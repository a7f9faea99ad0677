"""LoRA: low-rank adapters that `peft` puts into a frozen model, in place (Hu et al. 2021, arXiv 2106.09685).

The model gets no wrapper: its class, `base_model` and LM head stay the same. An adapted layer `x.q_proj` keeps its
weight as `x.q_proj.base_layer.weight` and gets `x.q_proj.lora_A.default.weight` `[r, in]` and
`x.q_proj.lora_B.default.weight` `[out, r]`. Exported tensors have the names of the model without adapters, or `peft`'s.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from selfgen_ds.config import LoraConfig
from selfgen_ds.errors import InputError
from selfgen_ds.files import absolute_folder
from selfgen_ds.model.names import numberless

log = logging.getLogger("selfgen_ds")

_ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Parts of the names of layers that choose or weight experts."""
_ADAPTER = "default"  # peft's name for a model's only adapter


def add_adapter(model: PreTrainedModel, lora: LoraConfig, base: str) -> None:
    """Freeze the model but for `modules_to_save`, and put adapters into it, in the model's dtype.

    B is 0 at first, so that the model still computes the same. The caller seeds torch with the same seed on all ranks.
    Where `peft` puts a trained copy beside each module to save, the module itself is trained here: no weights are held
    twice, and the LM head stays where it is.

    Args:
        base: Folder or hub id of the model.

    Raises:
        InputError: `target_modules` names no linear layer, or a layer that cannot be adapted; `modules_to_save` names
            no module, one with adapters in it, or one that is frozen already because text does not reach it.
    """
    saved = _modules_to_save(model, lora.modules_to_save)
    if lora.target_modules == "all-linear":
        targets = _all_linear(model, saved)
    else:
        targets = _without_frozen(model, lora.target_modules)
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
        # The factors of an adapted embedding are parameters without a module: ZeRO-3 would not gather them.
        if type(layer) is not Linear or layer is model.get_output_embeddings():
            raise InputError(f"model.lora.target_modules: expected linear layers below the LM head, got {name}")
    for name in saved:
        if inside := [layer for layer in layers if f"{layer}.".startswith(f"{name}.")]:
            raise InputError(f"model.lora.modules_to_save: {name} holds the adapted layer {inside[0]}; drop one")
        model.get_submodule(name).requires_grad_(True)
    model.register_state_dict_post_hook(_drop_frozen)


def _modules_to_save(model: PreTrainedModel, ends: list[str]) -> list[str]:
    """Return the names of the modules with these ends, which have parameters.

    Raises:
        InputError: No module has such a name, or a parameter of one is frozen already.
    """
    found = []
    for end in ends:
        named = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{end}")]
        weights = {f"{n}.{w}": p for n in named for w, p in model.get_submodule(n).named_parameters()}
        if not weights:
            names = ", ".join(dict.fromkeys(n.rpartition(".")[2] for n, m in model.named_modules() if m._parameters))
            raise InputError(
                f"model.lora.modules_to_save: the model has no module {end!r} with weights; it has {names}"
            )
        if frozen := [name for name, weight in weights.items() if not weight.requires_grad]:
            raise InputError(f"model.lora.modules_to_save: text does not reach {frozen[0]}")
        found += named
    return found


def _all_linear(model: PreTrainedModel, saved: list[str]) -> list[str] | str:
    """Return peft's targets for every linear layer but the head, routers, and layers that are frozen already.

    peft's own "all-linear" includes routers.

    Args:
        saved: Names of modules that are trained whole.
    """
    chosen = [
        name
        for name, module in model.named_modules()
        if _can_be_adapted(model, name, module) and not any(f"{name}.".startswith(f"{whole}.") for whole in saved)
    ]
    return _targets(model, chosen)


def _without_frozen(model: PreTrainedModel, targets: str | list[str]) -> list[str] | str:
    """Return a recipe's targets, or others in their place that leave out layers which are frozen already.

    Raises:
        InputError: All of the layers are frozen, or the targets are no regular expression.
    """
    try:
        layers = _linear_layers(model, targets)
    except re.error as error:
        raise InputError(f"model.lora.target_modules: {error}") from error
    if isinstance(targets, str) and not layers:  # no regular expression, but names
        targets = [name.strip() for name in targets.split(",")]
        layers = _linear_layers(model, targets)
    for target in [] if isinstance(targets, str) else targets:
        if not any(_matches([target], name) for name, _ in model.named_modules()):
            known = dict.fromkeys(n.rpartition(".")[2] for n, m in model.named_modules() if _is_linear(m))
            raise InputError(
                f"model.lora.target_modules: the model has no linear layer {target!r}; it has {', '.join(known)}"
            )
    reached = [name for name in layers if model.get_submodule(name).weight.requires_grad]
    if reached == layers:  # peft or the caller refuses targets that match no layer
        return targets
    if not reached:
        raise InputError(f"model.lora.target_modules: text reaches no layer {targets!r}")
    return _targets(model, reached)


def _linear_layers(model: PreTrainedModel, targets: str | list[str]) -> list[str]:
    return [name for name, module in model.named_modules() if _is_linear(module) and _matches(targets, name)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _matches(targets: str | list[str], name: str) -> bool:
    """Return whether `peft` takes a module for a target."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _targets(model: PreTrainedModel, chosen: list[str]) -> list[str] | str:
    """Return peft's targets for some modules: the last parts of their names, or else a regular expression."""
    names = [name for name, _ in model.named_modules()]
    last_parts = {name.rpartition(".")[2] for name in chosen}
    if [name for name in names if name.rpartition(".")[2] in last_parts] == chosen:
        return sorted(last_parts)
    exact = [re.escape(name) for name in chosen]
    of_any_layer = "|".join(dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", name) for name in exact))
    return of_any_layer if [name for name in names if re.fullmatch(of_any_layer, name)] == chosen else "|".join(exact)


def _can_be_adapted(model: PreTrainedModel, name: str, module: nn.Module) -> bool:
    """Return whether `all-linear` adapts a module. Routers, which choose experts, are left out."""
    if not _is_linear(module) or module is model.get_output_embeddings():
        return False
    is_router = not _ROUTERS.isdisjoint(name.split("."))
    return bool(module.weight.requires_grad) and not is_router and not _refused_by_peft(model, name)


def _refused_by_peft(model: PreTrainedModel, name: str) -> bool:
    """Return whether peft cannot adapt a linear layer because of the last part of its name.

    The fused kernels of state-space models would pass an adapter by. In models whose experts were linear layers before
    transformers 5, peft takes a name such as `gate_proj` for that of the experts, wherever in the model it is.
    """
    last = name.rpartition(".")[2]
    pattern = _MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    if last in _MOE_TARGET_MODULE_MAPPING.get(pattern, {}):
        return True
    try:
        _check_lora_target_modules_mamba(peft.LoraConfig(), model, last)
    except ValueError:
        return True
    return False


def log_left_out(model: PreTrainedModel) -> None:
    """Name, in the log, the matrices of the model that have no adapter, with * for numbers in their names."""
    adapted, embeddings = adapted_layers(model), model.get_input_embeddings().weight
    left = [
        numberless(name)
        for name, parameter in without_adapters(dict(model.named_parameters()), adapted).items()
        if name not in adapted and len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        if parameter is not embeddings and not parameter.requires_grad
    ]
    if left:
        log.info("model.lora: no adapters in %s", ", ".join(dict.fromkeys(left)))


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Remove frozen parameters from a state dict under all of their names.

    DeepSpeed's `exclude_frozen_parameters` removes one name per parameter, and would save a tied LM head.
    """
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def adapted_layers(model: nn.Module) -> dict[str, Linear]:
    """Return the adapted layers, by the name of their weight in the model without adapters."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


def without_adapters(tensors: dict[str, Tensor], layers: dict[str, Linear]) -> dict[str, Tensor]:
    """Return the tensors of a model, without the adapters', by their names in the model without adapters.

    Args:
        tensors: Parameters and buffers of the adapted model, by name.
        layers: The result of `adapted_layers`.
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
    """Return A `[r, in]` and B `[out, r]` of a layer; under ZeRO-3 they may be partitioned."""
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def merge(layer: Linear, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `weight + scale * B A`, summed in float32 and rounded once to the weight's dtype.

    Args:
        layer: The adapted layer, whose `scaling` is `lora_alpha / r`.
        weight: `[out, in]`, or `[in, out]` for a layer with `fan_in_fan_out`.
        a: `[r, in]`.
        b: `[out, r]`.
    """
    product = b.float() @ a.float()
    if layer.fan_in_fan_out:
        product = product.T
    return torch.add(weight.float(), product, alpha=layer.scaling[_ADAPTER]).to(weight.dtype)


def targets_of(model: PreTrainedModel) -> list[str] | str:
    """Return the targets that `all-linear` stands for in a model with adapters, or the recipe's own targets."""
    targets = model.peft_config[_ADAPTER].target_modules
    return targets if isinstance(targets, str) else sorted(targets)


def save_adapter(model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write an adapter folder in `peft`'s format, without a tokenizer.

    Weights that the model ties and trains are written under each of their names, because `peft` unties them.

    Args:
        tensors: The trained parameters, by name.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    aliases = {group[0]: group for group in names.values()}
    named = {alias: t.clone() if i else t for name, t in tensors.items() for i, alias in enumerate(aliases[name])}
    files = {f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": tensor for name, tensor in named.items()}
    save_file(files, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / SAFETENSORS_WEIGHTS_NAME).chmod(0o644)  # safetensors makes a file that only its owner can read
    config = copy.copy(model.peft_config[_ADAPTER])
    config.inference_mode = True
    config.target_modules = targets_of(model)
    whole = [name for name in named if f".{_ADAPTER}." not in name]
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in whole}) or None
    config.save_pretrained(str(folder))


def unwrap_saved_modules(model: PreTrainedModel) -> None:
    """Put the trained modules of a loaded adapter in the places of `peft`'s wrappers, which hold the former ones too.

    An LM head must be the linear layer itself.
    """
    wrappers = [(name, module) for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name, wrapper in wrappers:
        model.set_submodule(name, wrapper.modules_to_save[_ADAPTER])


def base_of(name: str) -> str:
    """Return the model that an adapter folder was trained on; for any other folder or hub id, `name` itself.

    Raises:
        InputError: The base model no longer exists, or the adapter's configuration is unreadable.
    """
    folder = Path(name)
    if not (folder / CONFIG_NAME).is_file() or (folder / MODEL_CONFIG_NAME).is_file():
        return name
    try:
        base = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{folder / CONFIG_NAME}: expected an adapter's configuration in JSON: {error!r}") from error
    check_base(str(folder), base)
    return base


def check_base(trained: str, base: str) -> None:
    """Check that the base model of a trained adapter is still there, if it was a folder.

    Args:
        trained: Where the adapter is, for the message.
        base: Absolute path, or hub id.

    Raises:
        InputError: The folder no longer exists.
    """
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(f"{trained}: the adapter's base model {base} no longer exists")
