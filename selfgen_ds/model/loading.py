"""Load or create the causal LM: sharded under ZeRO-3, with a forward that reduces hidden states at the LM head."""

from __future__ import annotations

import json
import logging
import re
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
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from selfgen_ds.config import ModelConfig
from selfgen_ds.data.hub import use_cache_without_network
from selfgen_ds.errors import InputError
from selfgen_ds.files import refusal
from selfgen_ds.model import lora
from selfgen_ds.model.head import LogitTransform
from selfgen_ds.model.reductions import add_reductions
from selfgen_ds.ranks import process_group

log = logging.getLogger("selfgen_ds")


def model_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Return the `transformers` configuration of the recipe's model. No weights are read.

    Raises:
        InputError: The configuration cannot be loaded, the model is not a causal LM, or the tokenizer has ids for which
            the model has no embedding.
    """
    config = _preset_config(model, tokenizer) if model.name_or_path is None else _saved_config(model)
    remote = model.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if config.is_encoder_decoder or not (remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise InputError(f"model: expected a causal language model, got model type {config.model_type!r}")
    try:
        text = config.get_text_config(decoder=True)
        text.vocab_size  # noqa: B018 (a text model has one)
    except (ValueError, AttributeError) as error:  # the model has several text models, or none
        raise InputError(f"model: expected a causal language model, got model type {config.model_type!r}") from error
    if text is not config and (coefficient := getattr(config, "router_aux_loss_coef", None)) is not None:
        text.router_aux_loss_coef = coefficient  # written beside the sections of a multimodal configuration
    size = vocabulary(tokenizer)
    if size > text.vocab_size and not model.resize_embeddings:
        raise InputError(
            f"model.tokenizer: {size} ids, but the model has embeddings for {text.vocab_size}; "
            "model.resize_embeddings=true adds rows"
        )
    return config


def _preset_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Return the configuration of `model.preset`, whose vocabulary and special tokens come from the tokenizer."""
    fields = dict(model.preset or {})
    model_type = fields.pop("model_type", "llama")
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"model.preset: model_type: expected a model type of transformers, got {model_type!r}")
    defaults = {
        "vocab_size": vocabulary(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        config: PretrainedConfig = AutoConfig.for_model(model_type, **defaults | fields)
        known = CONFIG_MAPPING[model_type]()
    except Exception as error:  # the exception's type differs by field; its message names the wrong one
        raise InputError(f"model.preset: {' '.join(str(error).split())}") from error
    # A coefficient of 0 turns the router loss off, even for types that have no such field.
    if unknown := set(fields) - set(known.to_dict()) - set(known.attribute_map) - {"router_aux_loss_coef"}:
        raise InputError(f"model.preset: not fields of a {model_type} configuration: {', '.join(sorted(unknown))}")
    return config


def _saved_config(model: ModelConfig) -> PretrainedConfig:
    """Return the configuration of `model.name_or_path`; the fields of `model.preset` must agree with it."""
    try:
        name = lora.base_of(str(model.name_or_path))
        if not Path(name).is_dir():
            use_cache_without_network()
        for file in (CONFIG_NAME, GENERATION_CONFIG_NAME):
            _check_json_object(Path(name) / file)
        config = AutoConfig.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise InputError(f"model.name_or_path: no model at {model.name_or_path!r}: {reason}") from error
    except Exception as error:  # a field of config.json: the exception's type differs by field
        reason = " ".join(str(error).split())
        raise InputError(f"model.name_or_path: config.json of {model.name_or_path!r}: {reason}; mend it") from error
    _check_generation_config(name)
    differing = [
        f"{name} is {getattr(config, name, None)!r}, not {value!r}"
        for name, value in (model.preset or {}).items()
        if getattr(config, name, None) != value
    ]
    if differing:
        raise InputError(f"model.preset: {model.name_or_path!r} is another model: {', '.join(differing)}")
    return config


def _check_json_object(file: Path) -> None:
    """Check that a file, if there is one, can be read and holds a JSON object.

    Raises:
        InputError: It does not. The message names the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except OSError as error:
        raise InputError(refusal(error) or str(error)) from error
    except ValueError as error:
        raise InputError(f"{file}: malformed JSON: {error}; mend the file") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(content).__name__}; mend the file")


def _check_generation_config(name: str) -> None:
    """Check that the generation defaults of a folder or hub id can be read, if it has any.

    Raises:
        InputError: They cannot, or `eos_token_id` is neither a token id nor a list of them.
    """
    file = Path(name) / GENERATION_CONFIG_NAME
    try:
        ends = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # there are none
        return
    except Exception as error:  # transformers raises many types
        raise InputError(f"{file}: {' '.join(str(error).split())}; mend or remove the file") from error
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise InputError(f"{file}: eos_token_id: expected a token id or a list of them, got {ends!r}")


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of embeddings that a tokenizer needs: its highest id plus 1, because ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def most_positions(config: PretrainedConfig) -> int | None:
    """Return the tokens of the longest row that a model can read; None if its configuration sets no limit.

    Under LongRoPE, what a row computes depends on whether the longest row of its batch passes the original length: no
    row may pass it, or else losses and answers would depend on a row's neighbors.
    """
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    per_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in per_layer_type or [rope]:
        if parameters.get("rope_type") == "longrope":
            return parameters["original_max_position_embeddings"]
    return getattr(text, "max_position_embeddings", None)


def from_config(model: ModelConfig, config: PretrainedConfig, **settings: Any) -> PreTrainedModel:
    """Create the model with new weights, initialized by transformers."""
    return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code, **settings)


def parameter_count(model: ModelConfig, config: PretrainedConfig) -> int:
    """Count the parameters of the model that a configuration describes, without allocating them.

    Raises:
        InputError: No model can be built from the configuration.
    """
    return sum(p.numel() for p in _without_data(model, config).parameters())


def trained_parameter_count(model: ModelConfig, config: PretrainedConfig) -> int:
    """Count the parameters that are trained: all of them, or those of the adapter.

    Raises:
        InputError: No model can be built from the configuration, or the adapter does not fit the model.
    """
    built = _without_data(model, config)
    if model.lora is not None:
        with torch.device("meta"):
            lora.add_adapter(built, model.lora, "")
    return sum(p.numel() for p in built.parameters() if p.requires_grad)


def _without_data(model: ModelConfig, config: PretrainedConfig) -> PreTrainedModel:
    """Create the model on the meta device, where tensors have shapes but no data."""
    try:
        with torch.device("meta"):
            return from_config(model, config, attn_implementation=model.attn_implementation)
    except Exception as error:  # torch and transformers raise many types
        if "attention implementation" in str(error):
            raise InputError(
                f"model.attn_implementation: model type {config.model_type!r} has no {model.attn_implementation}; "
                "every model has eager"
            ) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"model: config.json or model.preset: no model can be built from it: {reason}") from error


def build_model(
    model: ModelConfig, config: PretrainedConfig, logit_transform: LogitTransform | None = None, embeddings: int = 0
) -> PreTrainedModel:
    """Return the model with its weights and reductions, in training mode.

    While an `HfDeepSpeedConfig` for ZeRO-3 is alive, each rank holds its shard of the weights only.

    The caller seeds torch before and after: new weights depend on the seed (and on whether the stage is 3, but not on
    the world size), and initialization leaves the ranks with different generator states.

    Args:
        logit_transform: The result of `selfgen_ds.model.probe.check`.
        embeddings: Rows that the tokenizer needs. A model with fewer rows gets new ones.

    Raises:
        InputError: Weights are missing or do not fit the configuration, or transformers cannot build the model.
    """
    dtype = getattr(torch, model.dtype)
    try:
        if model.name_or_path is None:
            built = from_config(model, config, dtype=dtype, attn_implementation=model.attn_implementation)
        else:
            built = _load_weights(model, config, dtype)
    except InputError:
        raise
    except Exception as error:  # the type depends on the model's code, which may not suit ZeRO-3
        where, reason = f"model type {config.model_type!r}", " ".join(str(error).split())
        raise InputError(f"model: {where}: transformers cannot build it: {type(error).__name__}: {reason}") from error
    built.config.architectures = [type(built).__name__]  # for checkpoints and exports
    if embeddings > built.get_input_embeddings().num_embeddings:
        _add_embeddings(built, embeddings)
    # `from_pretrained` returns a model in evaluation mode, in which activation checkpointing has no effect.
    return add_reductions(built, logit_transform).train()


def _load_weights(model: ModelConfig, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model from `model.name_or_path`; every weight must be there."""
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
    lora.unwrap_saved_modules(built)
    # The export reverses these conversions. Under ZeRO-3, transformers also lists conversions that it did not apply.
    built._weight_conversions = [c for c in built._weight_conversions or [] if c.was_used()]
    return built


def warn_of_rounding(model: PreTrainedModel) -> None:
    """Name the parameters that plain transformers keeps in float32, but DeepSpeed trains in the dtype of all others."""
    kept = model._keep_in_fp32_modules_strict or ()  # `_keep_in_fp32_modules` is for float16 alone
    pattern = re.compile("|".join(rf"(?:^|\.){part}(?:$|\.)" for part in kept) or "(?!)")
    rounded = [n for n, p in model.named_parameters() if p.dtype != torch.float32 and pattern.search(n)]
    if rounded:
        log.warning(
            "DeepSpeed rounds %d tensors to %s that plain transformers keeps in float32, the first is %s; their "
            "optimizer states are float32, and model.dtype: float32 rounds nothing",
            *(len(rounded), str(model.dtype).removeprefix("torch."), rounded[0]),
        )


def checkpoint_activations(model: PreTrainedModel, offload: bool) -> None:
    """Keep only the input of each layer for the backward, which computes the rest again.

    Args:
        offload: Whether the inputs are kept in host memory.
    """
    old_name = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old_name)()
    if offload:
        # Transformers' own `offload=True` asks for pinned memory, which a CPU accelerator does not have.
        device = process_group.device().type

        def offloaded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with save_on_cpu(pin_memory=device != "cpu", device_type=device):
                return checkpoint(function, *args, use_reentrant=False, **kwargs)

        model._set_gradient_checkpointing(gradient_checkpointing_func=offloaded)


def _add_embeddings(model: PreTrainedModel, size: int) -> None:
    """Add rows, means of the old ones, to embeddings and output layer. Collective: every rank must call this."""
    before = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size, mean_resizing=False)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    rows = {id(p): p for layer in layers for p in (layer.weight, getattr(layer, "bias", None)) if p is not None}
    for parameter in rows.values():  # tied weights are one parameter
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter[before:] = parameter[:before].float().mean(dim=0)
