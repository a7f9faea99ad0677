"""Build a small random copy of a model, which has every kind of layer and can be tried in seconds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from selfgen_ds.config import ModelConfig
from selfgen_ds.errors import InputError
from selfgen_ds.model.attention import is_flash, masks_packed_rows
from selfgen_ds.model.loading import from_config, parameter_count
from selfgen_ds.model.reductions import backbone
from selfgen_ds.ranks import process_group

ATTENTION_WINDOW = 4
"""Tokens of sliding or chunked attention in a shrunk model."""
_VOCABULARY = 256
_INNER_WIDTHS = ("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "inner_dim")
_TRIED_TOKENS = 7
_MOST = 20_000_000  # parameters of a model that is tried as it is


def small_copy(model: ModelConfig, config: PretrainedConfig) -> PreTrainedModel:
    """Return a small copy of the model in evaluation mode, whose random weights are large enough for each to count.

    The copy is float32 on the CPU. For flash and flex attention it is on the rank's device, for which they are made,
    and with flash attention bfloat16. Call this under `torch.no_grad()`, because the weights are changed in place.

    Raises:
        InputError: No small copy of the model can be built, or none has finite hidden states.
    """
    size = parameter_count(model, config)
    shrinks: list[Callable[[PretrainedConfig], PretrainedConfig]] = [copy.deepcopy]
    if size > _MOST:
        shrinks = [_narrow, *(partial(_fewer_heads, factor=factor) for factor in _factors(config)), _shallow]
    dtype = torch.bfloat16 if is_flash(model.attn_implementation) else torch.float32
    device = torch.device("cpu") if masks_packed_rows(model.attn_implementation) else process_group.device()
    problem = "the copy is too large"
    for shrink in shrinks:
        try:
            smaller = shrink(config)
            if parameter_count(model, smaller) > 5 * _MOST:
                smaller = _shallow(smaller)
            if parameter_count(model, smaller) > 10 * _MOST:
                continue
            built = from_config(model, smaller, dtype=dtype, attn_implementation=model.attn_implementation)
            built = built.to(device).eval()
            _randomize(built)
            if torch.isfinite(backbone(built, random_ids(built, _TRIED_TOKENS)).last_hidden_state).all():
                return built
            problem = "the copy's hidden states are not finite"
        except Exception as error:  # types differ by model
            problem = " ".join(str(error).split())
    raise InputError(f"model: no small copy of model type {config.model_type!r} could be tried: {problem}")


def random_ids(model: PreTrainedModel, length: int) -> Tensor:
    """Draw one row of token ids, `[1, length]` int64."""
    return torch.randint(model.config.get_text_config(decoder=True).vocab_size, (1, length), device=model.device)


def _randomize(model: PreTrainedModel) -> None:
    """Draw new matrices that keep the size of their inputs, and move norms and biases a little."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _narrow(config: PretrainedConfig) -> PretrainedConfig:
    """Keep at most 2 heads of keys and values, make all heads small, and shrink the hidden size with them."""
    text = config.get_text_config(decoder=True)
    heads, size = text.num_attention_heads, 16
    groups = getattr(text, "num_key_value_heads", None) or heads
    kept = min(groups, 2)
    fewer = max(1, heads * kept // groups)
    heads_of = {"num_attention_heads": fewer, "num_key_value_heads": kept, "head_dim": size}
    return _resized(config, heads_of | {"hidden_size": fewer * size})


def _factors(config: PretrainedConfig) -> list[int]:
    """Return the factors by which the heads of a model may be divided, the one that leaves the fewest heads first."""
    text = config.get_text_config(decoder=True)
    names = ["num_key_value_heads", "num_attention_heads", *filter(_counts_parts, text.to_dict())]
    counts = [count for name in names if isinstance(count := _count(text, name), int) and count > 0]
    return list(dict.fromkeys([*counts[:1], math.gcd(*counts) or 64, 64, 16, 8, 4]))


def _count(text: PretrainedConfig, name: str) -> Any:
    """Return a field of a configuration; None if it has none, or another value in each layer."""
    try:
        return getattr(text, name, None)
    except RuntimeError:
        return None


def _counts_parts(name: str) -> bool:
    return name.endswith(("heads", "groups"))


def _fewer_heads(config: PretrainedConfig, factor: int) -> PretrainedConfig:
    """Keep fewer heads of each kind, in their old size, because rotary factors and state spaces depend on it."""
    text = config.get_text_config(decoder=True)
    return _resized(
        config,
        {
            name: value // factor
            for name in ("hidden_size", "num_attention_heads", *text.to_dict())
            if (name in ("hidden_size", "attention_hidden_size") or _counts_parts(name))
            and isinstance(value := _count(text, name), int)
            and value % factor == 0
        },
    )


def _resized(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """Return a copy with some fields changed and with a small vocabulary, attention window, and inner layer."""
    fields = config.to_dict()
    text, names = _text_fields(config, fields), config.get_text_config(decoder=True).attribute_map
    changes |= dict.fromkeys(("sliding_window", "attention_chunk_size", "block_size"), ATTENTION_WINDOW)
    for name, value in text.items():
        if name.startswith("vocab_size"):
            changes[name] = _VOCABULARY
        elif ("intermediate_size" in name or name in _INNER_WIDTHS) and value:
            changes[name] = [64] * len(value) if isinstance(value, list) else 64
        elif name.endswith("_token_id") and isinstance(value, int):
            changes[name] = min(value, _VOCABULARY - 1)
    for name, value in changes.items():
        stored = names.get(name, name)
        if text.get(stored) is not None:
            text[stored] = value
    return type(config).from_dict(fields)


def _shallow(config: PretrainedConfig) -> PretrainedConfig:
    """Keep the first layers, as many as it takes to have a layer of every kind."""
    fields = config.to_dict()
    text, original = _text_fields(config, fields), config.get_text_config(decoder=True)
    layers = original.num_hidden_layers
    lists = [name for name, value in text.items() if isinstance(value, list) and len(value) == layers]
    kinds_of = [text[name] for name in lists if text[name] != list(range(layers))]  # such a list numbers the layers
    kinds = list(zip(*(map(str, values) for values in kinds_of), strict=True)) or [()] * layers
    count = max(kinds.index(kind) + 1 for kind in set(kinds))
    # Fields that say "every n layers" or "the first n layers".
    periods = ("_interval", "_step", "_period", "_freq", "_frequency", "_replace")
    count = max(count, 2, *(v + 1 for n, v in text.items() if n.endswith(periods) and isinstance(v, int) and v < 16))
    count = min(count, layers)
    text[original.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = count
    for name in lists:
        text[name] = text[name][:count]
    for name, value in text.items():
        if isinstance(value, dict) and value and all(str(key).isdecimal() for key in value):  # layer -> its settings
            text[name] = {key: settings for key, settings in value.items() if int(key) < count}
    return type(config).from_dict(fields)


def _text_fields(config: PretrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `fields` that describes the text model. Towers for other inputs are cut to one layer."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return fields
    parts = [name for name, value in vars(config).items() if isinstance(value, PretrainedConfig)]
    for name in parts:
        if getattr(config, name) is not text and "num_hidden_layers" in fields[name]:
            fields[name]["num_hidden_layers"] = 1
    return next(fields[name] for name in parts if getattr(config, name) is text)
