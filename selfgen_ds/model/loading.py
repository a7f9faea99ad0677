"""The causal LM: created sharded under ZeRO-3, its forward extended by reductions at the LM head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selfgen_ds.config import ModelConfig
from selfgen_ds.data.hub import use_cache_without_network
from selfgen_ds.errors import InputError
from selfgen_ds.model import lora
from selfgen_ds.model.head import LogitTransform
from selfgen_ds.model.reductions import add_reductions
from selfgen_ds.ranks import process_group


def model_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The `transformers` configuration of the recipe's model, without its weights.

    Raises:
        InputError: It cannot be loaded, is no causal LM, or the tokenizer has ids that it has no embedding for.
    """
    config = _preset_config(model, tokenizer) if model.name_or_path is None else _saved_config(model)
    remote = model.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if config.is_encoder_decoder or not (remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise InputError(f"model: expected a causal language model, got model type {config.model_type!r}")
    try:
        text = config.get_text_config(decoder=True)
    except ValueError as error:  # several towers of text
        raise InputError(f"model: expected a causal language model, got model type {config.model_type!r}") from error
    size = vocabulary(tokenizer)
    if size > text.vocab_size and not model.resize_embeddings:
        raise InputError(
            f"model.tokenizer: {size} ids, but the model has embeddings for {text.vocab_size}; "
            "model.resize_embeddings=true adds rows"
        )
    return config


def _preset_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    fields = dict(model.preset or {})
    model_type = fields.pop("model_type", "llama")
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"model.preset: model_type: transformers knows no {model_type!r}")
    defaults = {
        "vocab_size": vocabulary(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        config: PretrainedConfig = AutoConfig.for_model(model_type, **defaults | fields)
        known = CONFIG_MAPPING[model_type]()
    except Exception as error:  # the field that is wrong is in the message; its type differs by field
        raise InputError(f"model.preset: {' '.join(str(error).split())}") from error
    # what turns the router loss off is a field of any mixture of experts
    if unknown := set(fields) - set(known.to_dict()) - set(known.attribute_map) - {"router_aux_loss_coef"}:
        raise InputError(f"model.preset: not fields of a {model_type} configuration: {', '.join(sorted(unknown))}")
    return config


def _saved_config(model: ModelConfig) -> PretrainedConfig:
    try:
        name = lora.base_of(str(model.name_or_path))
        if not Path(name).is_dir():
            use_cache_without_network()
        config = AutoConfig.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise InputError(f"model.name_or_path: no model at {model.name_or_path!r}: {reason}") from error
    differing = [
        f"{name} is {getattr(config, name, None)!r}, not {value!r}"
        for name, value in (model.preset or {}).items()
        if getattr(config, name, None) != value
    ]
    if differing:
        raise InputError(f"model.preset: {model.name_or_path!r} is another model: {', '.join(differing)}")
    return config


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Embeddings that a tokenizer needs: its highest id and one. There may be gaps below."""
    return max(tokenizer.get_vocab().values()) + 1


def most_positions(config: PretrainedConfig) -> int | None:
    """The longest row that a model takes; None if its configuration sets no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def from_config(model: ModelConfig, config: PretrainedConfig, **settings: Any) -> PreTrainedModel:
    """The model with new weights, in transformers' own initialisation."""
    return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code, **settings)


def parameter_count(model: ModelConfig, config: PretrainedConfig) -> int:
    """Parameters of the model that a configuration describes; nothing is allocated.

    Raises:
        InputError: There is no such model.
    """
    return sum(p.numel() for p in _without_data(model, config).parameters())


def trained_parameter_count(model: ModelConfig, config: PretrainedConfig) -> int:
    """Those that are not frozen.

    Raises:
        InputError: There is no such model, or the adapter does not fit it.
    """
    built = _without_data(model, config)
    if model.lora is not None:
        with torch.device("meta"):
            lora.add_adapter(built, model.lora, "")
    return sum(p.numel() for p in built.parameters() if p.requires_grad)


def _without_data(model: ModelConfig, config: PretrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return from_config(model, config, attn_implementation=model.attn_implementation)
    except Exception as error:  # torch's and transformers' types differ by what is wrong
        if "attention implementation" in str(error):
            raise InputError(
                f"model.attn_implementation: model type {config.model_type!r} has no {model.attn_implementation}; "
                "every model has eager"
            ) from error
        raise InputError(f"model: cannot be built: {' '.join(str(error).split())}") from error


def build_model(
    model: ModelConfig, config: PretrainedConfig, form: LogitTransform | None = None, embeddings: int = 0
) -> PreTrainedModel:
    """The model with its weights, on this rank's shard alone where a ZeRO-3 `HfDeepSpeedConfig` is alive.

    The caller seeds torch first (from scratch, weights depend on the seed and on whether the stage is 3, not on
    the world size), and again afterwards: initialisation leaves the ranks with different generator states.

    Args:
        form: From `selfgen_ds.model.probe.check`.
        embeddings: Rows that the tokenizer needs; a model with fewer gets more.

    Raises:
        InputError: Weights are missing or do not fit.
    """
    dtype = getattr(torch, model.dtype)
    if model.name_or_path is None:
        built = from_config(model, config, dtype=dtype, attn_implementation=model.attn_implementation)
    else:
        try:
            built, loaded = AutoModelForCausalLM.from_pretrained(
                model.name_or_path,
                config=config,
                dtype=dtype,
                attn_implementation=model.attn_implementation,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise InputError(f"model.name_or_path: no weights from {model.name_or_path!r}: {reason}") from error
        if absent := sorted(loaded["missing_keys"]):
            raise InputError(
                f"model.name_or_path: {model.name_or_path!r} lacks {len(absent)} tensors, the first is {absent[0]}"
            )
        # for the export; under ZeRO-3 transformers notes those too that it did not apply
        built._weight_conversions = [c for c in built._weight_conversions or [] if c.was_used()]
    built.config.architectures = [type(built).__name__]  # for checkpoints and exports
    if embeddings > built.get_input_embeddings().num_embeddings:
        _add_embeddings(built, embeddings)
    return add_reductions(
        built, form
    ).train()  # `from_pretrained` leaves it in eval mode, where nothing is checkpointed


def checkpoint_activations(model: PreTrainedModel, offload: bool) -> None:
    """Keep of a layer its input alone, in host memory if `offload`; the backward computes the rest again."""
    model.activation_checkpointing_enable()
    if offload:
        # as transformers' own `offload=True`, which asks for pinned memory on a CPU as well, where there is none
        device = process_group.device().type

        def offloaded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with save_on_cpu(pin_memory=device != "cpu", device_type=device):
                return checkpoint(function, *args, use_reentrant=False, **kwargs)

        model._set_gradient_checkpointing(gradient_checkpointing_func=offloaded)


def _add_embeddings(model: PreTrainedModel, size: int) -> None:
    """New rows of embeddings and output layer start as the mean of the old ones, the same on all ranks."""
    before = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size, mean_resizing=False)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    rows = {id(p): p for layer in layers for p in (layer.weight, getattr(layer, "bias", None)) if p is not None}
    for parameter in rows.values():  # once where weights are tied
        sharded = [parameter] if hasattr(parameter, "ds_id") else []
        with torch.no_grad(), deepspeed.zero.GatheredParameters(sharded, modifier_rank=0):
            parameter[before:] = parameter[:before].float().mean(dim=0)
