"""What training relies on, tried at the start on a small random copy of the model: its logits, its causality, its
packing, its router loss.

The copy has every kind of layer, in fewer widths. It is never sharded: make it before ZeRO-3 is set up.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from selfgen_ds.config import ModelConfig
from selfgen_ds.errors import InputError
from selfgen_ds.model.head import LMHead, LogitTransform, Projection
from selfgen_ds.model.loading import from_config, parameter_count
from selfgen_ds.model.reductions import add_reductions, backbone, router_loss_coefficient
from selfgen_ds.ranks import process_group

_LENGTHS = (7, 6)  # of two samples
_WORDS = 256
_WINDOW = 4  # of sliding or chunked attention: it must end inside a sample, and chunks must not fit them
_MOST = 20_000_000  # parameters that are tried as they are
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

# Fields of configurations, and whether they multiply (1) or divide (-1).
_SCALES = (
    ("logit_scale", 1),
    ("logits_scaling", -1),
    ("logits_scaling", 1),
    ("lm_head_multiplier", 1),
    ("output_multiplier", 1),
    ("logits_mup_width_multiplier", -1),
)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def check(model: ModelConfig, config: PretrainedConfig, packing: bool, training: bool = True) -> LogitTransform:
    """Try a small copy of the model; torch's generators are left as they were.

    Args:
        training: Whether a router loss is needed.
        packing: Whether rows will hold several samples.

    Returns:
        What the model makes of its output layer.

    Raises:
        InputError: Its training would not be right; names the model type.
    """
    name = f"model type {config.model_type!r}"
    coefficient = router_loss_coefficient(config) if training else 0.0
    if coefficient is None:
        raise InputError(_no_router_loss(name))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        small = _small(model, config)
        ids = _random_ids(small, sum(_LENGTHS))
        alone = [_hidden(small, sample) for sample in ids.split(_LENGTHS, dim=1)]
        naive = _hidden(small, ids)
        if not _same(naive[:, : _LENGTHS[0]], alone[0]):
            raise InputError(f"model: {name} is not causal: a token sees those after it")
        form = _form(small, config, ids)
        if form is None:
            raise InputError(f"model: {name} computes its logits in a way that is not known here")
        if packing:
            if _same(naive[:, _LENGTHS[0] :], alone[1]):
                raise InputError(f"data.packing: {name}: whether it keeps samples apart cannot be told")
            position_ids = torch.cat([torch.arange(n, device=small.device) for n in _LENGTHS])[None]
            if not _runs_equal(lambda: _hidden(small, ids, position_ids), torch.cat(alone, dim=1)):
                raise InputError(f"data.packing: {name} does not keep the samples of a packed row apart")
        if coefficient > 0:
            own = _attempt(lambda: small(ids, output_router_logits=True, use_cache=False).aux_loss)
            add_reductions(small, form)
            longer = F.pad(ids, (0, 1))  # the last token of a row is not read
            everywhere = torch.ones_like(longer, dtype=torch.bool)
            if own is None or not _runs_equal(
                lambda: small(longer, positions=~everywhere, routed=everywhere, reduction=_nothing)[1], own
            ):
                raise InputError(_no_router_loss(name))
    return form


def _no_router_loss(name: str) -> str:
    return (
        f"model: {name} is a mixture of experts whose router loss cannot be computed; it is trained without one if "
        "its configuration has router_aux_loss_coef: 0"
    )


def _nothing(hidden: Tensor, project: Projection) -> Tensor:
    return hidden.new_zeros(())


def _random_ids(model: PreTrainedModel, length: int) -> Tensor:
    return torch.randint(model.config.get_text_config(decoder=True).vocab_size, (1, length), device=model.device)


def _hidden(model: PreTrainedModel, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    return backbone(model, ids, position_ids).last_hidden_state


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding, compared with the largest value."""
    return bool((one - other).abs().max() <= _TOLERANCE.get(one.dtype, 1e-3) * other.abs().max())


def _attempt(work: Callable[[], Any]) -> Any:
    """None if it raises: what models raise when they are asked for what they cannot do differs by model."""
    try:
        return work()
    except Exception:
        return None


def _runs_equal(work: Callable[[], Tensor], expected: Tensor) -> bool:
    result = _attempt(work)
    return isinstance(result, Tensor) and result.shape == expected.shape and _same(result, expected)


def _form(model: PreTrainedModel, config: PretrainedConfig, ids: Tensor) -> LogitTransform | None:
    """The form that gives the model's own logits."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        add_reductions(model)  # says so
    # Words of very small and very large logits, so that scales and caps of any size show. A parameter of its own:
    # tied embeddings stay as they are.
    sizes = torch.logspace(-2, 3, len(linear.weight), device=model.device, dtype=linear.weight.dtype)
    linear.weight = nn.Parameter(linear.weight * sizes[:, None])
    own = model(ids, use_cache=False).logits.float()
    hidden = _hidden(model, ids)

    def gives_the_same(form: LogitTransform) -> bool:
        ours = LMHead(linear, form)(hidden, lambda rows, project: project.logits(rows))
        if not isinstance(ours, Tensor) or ours.shape != own.shape:
            return False
        tolerance = _TOLERANCE[linear.weight.dtype]
        # word by word, each compared with its own largest value
        return bool(((ours.float() - own).abs().amax(dim=1) <= tolerance * own.abs().amax(dim=1)).all())

    for scale, cap in itertools.product([*_SCALES, None], [*_CAPS, None]):
        if (small := _from(model.config, scale, cap)) is not None and gives_the_same(small):
            return _from(config, scale, cap)
    return None


def _from(config: PretrainedConfig, scale: tuple[str, int] | None, cap: str | None) -> LogitTransform | None:
    """The form that some fields of a configuration say, None if it has no such number."""
    text = config.get_text_config(decoder=True)
    factor = getattr(text, scale[0], None) if scale else 1.0
    limit = getattr(text, cap, None) if cap else None
    if not isinstance(factor, int | float) or not factor or (cap and not isinstance(limit, int | float)):
        return None
    return LogitTransform(scale=factor ** scale[1] if scale else 1.0, cap=limit)


def _small(model: ModelConfig, config: PretrainedConfig) -> PreTrainedModel:
    """A copy that can be tried in seconds, its weights random and of a size at which every part of it counts."""
    size = parameter_count(model, config)
    shrinks = [_narrow, _fewer_heads, _shallow] if size > _MOST else [copy.deepcopy]
    on_device = model.attn_implementation == "flash_attention_2"  # which runs nowhere else, nor in float32
    dtype, device = (torch.bfloat16, process_group.device()) if on_device else (torch.float32, torch.device("cpu"))
    problem = "it is too large"
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
            if torch.isfinite(_hidden(built, _random_ids(built, _LENGTHS[0]))).all():
                return built
            problem = "its hidden states are not finite"
        except Exception as error:  # types differ by model
            problem = " ".join(str(error).split())
    raise InputError(f"model: no small copy of model type {config.model_type!r} could be tried: {problem}")


def _randomize(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
        else:  # norms, biases: near what they were
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _narrow(config: PretrainedConfig) -> PretrainedConfig:
    """Few and small heads."""
    text = config.get_text_config(decoder=True)
    heads, size = text.num_attention_heads, 16
    groups = getattr(text, "num_key_value_heads", None) or heads
    kept = min(groups, 2)
    fewer = max(1, heads * kept // groups)
    return _resized(
        config,
        {
            "hidden_size": fewer * size,
            "num_attention_heads": fewer,
            "num_key_value_heads": kept,
            "head_dim": size,
        },
    )


def _fewer_heads(config: PretrainedConfig) -> PretrainedConfig:
    """Fewer heads of any kind, of the size that they have: rotary factors and state spaces depend on it."""
    text = config.get_text_config(decoder=True)
    factor = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return _resized(
        config,
        {
            name: value // factor
            for name in ("hidden_size", "num_attention_heads", *text.to_dict())
            if (name == "hidden_size" or name.endswith("heads"))
            and isinstance(value := getattr(text, name), int)
            and value % factor == 0
        },
    )


def _resized(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    fields = config.to_dict()
    text, names = _text_fields(config, fields), config.get_text_config(decoder=True).attribute_map
    changes |= {"sliding_window": _WINDOW, "attention_chunk_size": _WINDOW}
    for name, value in text.items():
        if name.startswith("vocab_size"):
            changes[name] = _WORDS
        elif _is_inner_width(name) and value:
            changes[name] = [64] * len(value) if isinstance(value, list) else 64
        elif name.endswith("_token_id") and isinstance(value, int):
            changes[name] = min(value, _WORDS - 1)
    for name, value in changes.items():
        stored = names.get(name, name)
        if text.get(stored) is not None:
            text[stored] = value
    return _rebuilt(config, fields)


def _is_inner_width(name: str) -> bool:
    return "intermediate_size" in name or name in ("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "inner_dim")


def _shallow(config: PretrainedConfig) -> PretrainedConfig:
    """The first layers, as many as have every kind."""
    fields = config.to_dict()
    text, original = _text_fields(config, fields), config.get_text_config(decoder=True)
    layers = original.num_hidden_layers
    lists = [name for name, value in text.items() if isinstance(value, list) and len(value) == layers]
    kinds = list(zip(*(map(str, text[name]) for name in lists), strict=True)) or [()] * layers
    count = max(kinds.index(kind) + 1 for kind in set(kinds))
    # "every so many layers", "the first so many layers"
    periods = ("_interval", "_step", "_period", "_freq", "_frequency", "_replace")
    count = max(count, 2, *(v + 1 for n, v in text.items() if n.endswith(periods) and isinstance(v, int) and v < 16))
    count = min(count, layers)
    text[original.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = count
    for name in lists:
        text[name] = text[name][:count]
    return _rebuilt(config, fields)


def _text_fields(config: PretrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """The part of `fields` that describes the text model; towers of other inputs get a single layer."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return fields
    parts = [name for name, value in vars(config).items() if isinstance(value, PretrainedConfig)]
    for name in parts:
        if getattr(config, name) is not text and "num_hidden_layers" in fields[name]:
            fields[name]["num_hidden_layers"] = 1
    return next(fields[name] for name in parts if getattr(config, name) is text)


def _rebuilt(config: PretrainedConfig, fields: dict[str, Any]) -> PretrainedConfig:
    return type(config).from_dict(fields)
