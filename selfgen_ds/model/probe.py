"""Check at the start that a model can be trained correctly: its logits, causality, packing, and router loss.

Each check runs on a small random copy of the model. ZeRO-3 would shard this copy, so check before ZeRO-3 is set up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from selfgen_ds.config import ModelConfig
from selfgen_ds.errors import InputError
from selfgen_ds.model.gathering import is_finite
from selfgen_ds.model.generation import Sharing
from selfgen_ds.model.head import LMHead, LogitTransform
from selfgen_ds.model.loading import from_config
from selfgen_ds.model.reach import Reach, try_rows
from selfgen_ds.model.reductions import add_reductions, backbone, packed_settings, router_loss_coefficient
from selfgen_ds.model.small_copy import random_ids, small_copy

# Tokens of two samples. The copy's attention window (`small_copy.ATTENTION_WINDOW`) ends inside both of them, and their
# lengths are no multiples of it, so that a window or chunk that reaches into the other sample is seen.
_LENGTHS = (7, 6)
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

# Fields of configurations that scale the logits, and whether they multiply (1) or divide (-1).
_SCALES = (
    ("logit_scale", 1),
    ("logits_scaling", -1),
    ("logits_scaling", 1),
    ("lm_head_multiplier", 1),
    ("output_multiplier", 1),
    ("logits_mup_width_multiplier", -1),
)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a model's small copy shows of the model."""

    logit_transform: LogitTransform
    reach: Reach
    """What text rows reach; everything if the model will not be trained."""
    checkpoints_activations: bool
    """Whether the model type has activation checkpointing."""
    sharing: Sharing
    """The prompts whose answers do not depend on the other prompts in their batch."""


def check(model: ModelConfig, config: PretrainedConfig, packing: bool, training: bool = True) -> Traits:
    """Try a small copy of the model and return what it shows.

    torch's random generators are left as they were.

    Args:
        packing: Whether a row will hold several samples.
        training: Whether the model will be trained.

    Raises:
        InputError: The model would be trained incorrectly. The message names the model type.
    """
    name = f"model type {config.model_type!r}"
    coefficient = router_loss_coefficient(config) if training else 0.0
    if coefficient is None:
        raise InputError(_no_router_loss(name))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        small = small_copy(model, config)
        ids = random_ids(small, sum(_LENGTHS))
        separate = [_hidden(small, sample) for sample in ids.split(_LENGTHS, dim=1)]
        joined = _hidden(small, ids)
        if not _equal(joined[:, : _LENGTHS[0]], separate[0]):
            raise InputError(f"model: {name} is not causal: a token sees the tokens after it")
        logit_transform = _find_logit_transform(small, config, ids)
        if logit_transform is None:
            raise InputError(f"model: {name} computes its logits in a way that selfgen-ds does not support")
        sharing = _sharing(small, ids)
        if packing:
            _check_packing(name, small, ids, joined, separate)
        if coefficient > 0:
            _check_router_loss(name, small, ids, logit_transform)
        reach = try_rows(small) if training else Reach(reached={}, routing=[])
        if model.name_or_path is None:
            _check_initialization(name, model, small.config)
    return Traits(
        logit_transform=logit_transform,
        reach=reach,
        checkpoints_activations=small.supports_gradient_checkpointing,
        sharing=sharing,
    )


def _check_initialization(name: str, model: ModelConfig, config: PretrainedConfig) -> None:
    """Check that a model from scratch sets all of its weights, which torch fills with NaN before.

    Args:
        config: That of the small copy.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # only then torch fills new tensors
    try:
        built = from_config(model, config, dtype=torch.float32, attn_implementation=model.attn_implementation)
    finally:
        torch.use_deterministic_algorithms(before)
    if unset := [weight for weight, parameter in built.named_parameters() if not is_finite(parameter)]:
        raise InputError(
            f"model.preset: {name} does not initialize {unset[0]}, which only a pretrained model has; "
            "give model.name_or_path"
        )


def _sharing(model: PreTrainedModel, ids: Tensor) -> Sharing:
    """Return which prompts may share a batch: the first tokens of an answer must have the logits that they have alone.

    Args:
        ids: `[1, L]` int64, from whose end the prompt is taken, and from whose start another prompt.
    """
    prompt, other = ids[:, -_LENGTHS[1] :], ids[:, : _LENGTHS[1]]
    model.generation_config = GenerationConfig()  # an end token of its own would cut one of the answers short
    settings = GenerationConfig(
        max_new_tokens=2, pad_token_id=0, output_logits=True, return_dict_in_generate=True, do_sample=False
    )

    def logits(prompts: Tensor, padding: int = 0) -> Tensor:
        padded, mask = (F.pad(t, (padding, 0)) for t in (prompts, torch.ones_like(prompts)))
        generated = model.generate(padded, attention_mask=mask, generation_config=settings)
        return torch.stack(generated.logits, dim=1)[:1]

    alone = _attempt(lambda: logits(prompt))
    if alone is None or not _gives(lambda: logits(torch.cat([prompt, other])), alone):
        return "none"
    return "any" if _gives(lambda: logits(prompt, _LENGTHS[0]), alone) else "one length"


def _check_packing(name: str, model: PreTrainedModel, ids: Tensor, joined: Tensor, separate: list[Tensor]) -> None:
    """Check that a packed row has the hidden states of its samples.

    Args:
        ids: `[1, L]` int64, two samples in one row.
        joined: `[1, L, H]`, the hidden states of the row read as one sample.
        separate: The hidden states of the two samples, each read alone.
    """
    if _equal(joined[:, _LENGTHS[0] :], separate[1]):
        raise InputError(
            f"data.packing: cannot tell whether {name} keeps packed samples apart; set data.packing: false"
        )
    position_ids = torch.cat([torch.arange(n) for n in _LENGTHS])[None]
    if not _gives(lambda: _hidden(model, ids, position_ids), torch.cat(separate, dim=1)):
        raise InputError(f"data.packing: {name} does not keep the samples of a packed row apart")


def _check_router_loss(name: str, model: PreTrainedModel, ids: Tensor, logit_transform: LogitTransform) -> None:
    """Check that the reduced forward gives the router loss of the model's own forward. Adds reductions to `model`."""
    expected = _attempt(lambda: model(ids, output_router_logits=True, use_cache=False).aux_loss)
    add_reductions(model, logit_transform)
    longer = F.pad(ids, (0, 1))  # the reduced forward does not read the last token of a row
    routed, nothing = torch.ones_like(longer, dtype=torch.bool), longer[0, :0]
    if expected is None or not _gives(
        lambda: model(longer, positions=nothing, routed=routed, reduction=lambda hidden, _: hidden.sum())[1],
        expected,
    ):
        raise InputError(_no_router_loss(name))


def _no_router_loss(name: str) -> str:
    return (
        f"model: {name} is a mixture of experts whose router loss cannot be computed; it is trained without one if "
        "its configuration has router_aux_loss_coef: 0.0"
    )


def _hidden(model: PreTrainedModel, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    packed = None if position_ids is None else packed_settings(model, position_ids)
    return backbone(model, ids, packed).last_hidden_state


def _equal(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding, relative to the largest expected value."""
    return bool((actual - expected).abs().max() <= _TOLERANCE.get(actual.dtype, 1e-3) * expected.abs().max())


def _attempt(work: Callable[[], Any]) -> Any:
    """Return the result of `work`, or None if it raises: which exception a model raises differs by model."""
    try:
        return work()
    except Exception:
        return None


def _gives(work: Callable[[], Tensor], expected: Tensor) -> bool:
    """Return whether `work` runs and returns the expected tensor."""
    result = _attempt(work)
    return isinstance(result, Tensor) and result.shape == expected.shape and _equal(result, expected)


def _find_logit_transform(model: PreTrainedModel, config: PretrainedConfig, ids: Tensor) -> LogitTransform | None:
    """Return the transform that gives the model's own logits, with the numbers of `config`; None if there is none.

    Every pair of a scale field and a cap field is tried with the numbers of the small model's configuration.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        add_reductions(model)  # raises the error for an output layer that is not linear
    # The logits range over five orders of magnitude from token to token, so that scales and caps of any size show. The
    # scaled weight is a new parameter, so that tied embeddings keep their values.
    sizes = torch.logspace(-2, 3, len(linear.weight), device=model.device, dtype=linear.weight.dtype)
    linear.weight = nn.Parameter(linear.weight * sizes[:, None])
    expected = model(ids, use_cache=False).logits.float()
    hidden = _hidden(model, ids)

    def gives_the_logits(transform: LogitTransform) -> bool:
        logits = LMHead(linear, transform)(hidden, lambda rows, project: project.logits(rows))
        if not isinstance(logits, Tensor) or logits.shape != expected.shape:
            return False
        tolerance = _TOLERANCE[linear.weight.dtype]
        # For each token of the vocabulary, errors are compared with this token's largest logit.
        return bool(((logits.float() - expected).abs().amax(dim=1) <= tolerance * expected.abs().amax(dim=1)).all())

    for scale, cap in itertools.product([*_SCALES, None], [*_CAPS, None]):
        small_transform = _transform_of(model.config, scale, cap)
        if small_transform is not None and gives_the_logits(small_transform):
            return _transform_of(config, scale, cap)
    return None


def _transform_of(config: PretrainedConfig, scale: tuple[str, int] | None, cap: str | None) -> LogitTransform | None:
    """Return the transform that two fields of a configuration describe; None if one of them has no number."""
    text = config.get_text_config(decoder=True)
    factor = getattr(text, scale[0], None) if scale else 1.0
    limit = getattr(text, cap, None) if cap else None
    if not isinstance(factor, int | float) or not factor or (cap and not isinstance(limit, int | float)):
        return None
    return LogitTransform(scale=factor ** scale[1] if scale else 1.0, cap=limit)
