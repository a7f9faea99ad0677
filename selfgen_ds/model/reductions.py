"""Extend a causal LM's forward by reductions that run at its LM head."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from selfgen_ds.errors import InputError
from selfgen_ds.model.attention import is_flash
from selfgen_ds.model.head import LMHead, LogitTransform, Reduction
from selfgen_ds.model.transfer import to_device


def add_reductions(model: PreTrainedModel, logit_transform: LogitTransform | None = None) -> PreTrainedModel:
    """Let `model(ids, positions=..., reduction=...)` reduce the hidden states of some positions at the LM head.

    The model is changed in place. Parameter names, the class name, and the plain forward stay the same, and so do
    checkpoints, exports, and `generate()`. The model's class becomes a subclass, as torch's FSDP2 does it.

    Raises:
        InputError: The output layer is not linear.
    """
    plain, output = type(model), model.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise InputError(
            f"model: model type {model.config.model_type!r} has no linear output layer ({type(output).__name__})"
        )

    @functools.wraps(plain.forward)  # `generate()` reads the signature
    def forward(self: PreTrainedModel, *args: Any, reduction: Reduction | None = None, **kwargs: Any) -> Any:
        return plain.forward(self, *args, **kwargs) if reduction is None else _reduce(self, reduction, *args, **kwargs)

    model.__class__ = type(plain.__name__, (plain,), {"forward": forward, "__module__": plain.__module__})
    model.set_output_embeddings(LMHead(output, logit_transform))
    model.router_loss_coefficient = router_loss_coefficient(model.config) or 0.0
    return model


def _reduce(
    model: PreTrainedModel,
    reduction: Reduction,
    context: Tensor,
    positions: Tensor,
    packed: dict[str, Any] | None = None,
    routed: Tensor | None = None,
) -> Any:
    """Apply `reduction` to the hidden states that predict the tokens at `positions`.

    The backbone does not read the last token of a row, because nothing is predicted from this token.

    Args:
        context: `[B, L]` int64, rows padded on the right.
        positions: `[B, L]` bool, False at position 0, or `[N]` int64, what `places_of` makes of it. The token at t is
            predicted from the tokens before t.
        packed: What `packed_settings` returns for packed rows.
        routed: `[B, L]` bool, the real tokens. If given, the router loss of a mixture of experts is computed over these
            tokens, except for the last token of each row.

    Returns:
        The result of `reduction`; with `routed`, a pair of this result and the router loss, a scalar without its
        coefficient.
    """
    settings = {} if routed is None else {"output_router_logits": True}
    output = backbone(model, context[:, :-1], packed, **settings)
    places = places_of(positions) if positions.dtype == torch.bool else positions
    result = model.get_output_embeddings()(output.last_hidden_state.flatten(0, 1)[places], reduction)
    return result if routed is None else (result, _router_loss(model, output.router_logits, routed[:, 1:]))


def places_of(mask: Tensor) -> Tensor:
    """Return where the hidden states stand that predict some tokens, in row-major order: `[N]` int64.

    Args:
        mask: `[B, L]` bool, False at position 0: the tokens. The hidden states are `[B, L - 1, H]`, and that at t - 1
            predicts the token at t. An accelerator makes the host wait here.
    """
    return mask[:, 1:].flatten().nonzero()[:, 0]


def backbone(model: PreTrainedModel, context: Tensor, packed: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Return the output of the model without its head; its `last_hidden_state` is `[B, L, H]`.

    transformers keeps the samples of a packed row apart only if the call has neither a mask nor a cache.

    Args:
        context: `[B, L]` int64.
        packed: What `packed_settings` returns for packed rows.
    """
    shape = context.shape
    if packed and "cu_seq_lens_q" in packed:
        context = context.reshape(1, -1)
    # Llama 4's causal LM names its backbone wrongly, so that `base_model` is the causal LM itself.
    base = model.base_model if model.base_model is not model else model.model
    output = base(input_ids=context, attention_mask=None, use_cache=False, **(packed or {}), **settings)
    output.last_hidden_state = output.last_hidden_state.reshape(*shape, -1)
    return output


def packed_settings(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Any]:
    """Return the settings of a forward by which the samples of packed rows are kept apart.

    Flash attention does so only in a batch of one row, which all rows therefore become. Where its samples start is
    passed along, because every layer would look for it again, and wait for the device each time.

    Args:
        position_ids: `[B, L]` int64 on the host, which count from 0 in each sample: those of the tokens that are read.
    """
    if not is_flash(model.config._attn_implementation):
        return {"position_ids": to_device(position_ids, model.device)}
    position_ids = position_ids.reshape(1, -1)
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    ends = F.pad(starts, (0, 1), value=position_ids.shape[1]).int()
    longest, ends = int(ends.diff().max()), to_device(ends, model.device)
    boundaries = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return boundaries | {"position_ids": to_device(position_ids, model.device)}


def _router_loss(model: PreTrainedModel, router_logits: tuple[Tensor, ...], routed: Tensor) -> Tensor:
    """Compute the load balancing loss by the function of the model's own module; 0 if there is no real token."""
    any_routed = routed.any()
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    loss = function(
        router_logits,
        num_experts=model.num_experts,
        top_k=model.num_experts_per_tok,
        attention_mask=routed | ~any_routed,  # the mean over no token would be NaN
    )
    return loss * any_routed


def router_loss_coefficient(config: PretrainedConfig) -> float | None:
    """Return the coefficient of a mixture of experts' load balancing loss; 0 for a dense model.

    None means that the model has experts, but its configuration has no coefficient.
    """
    text = config.get_text_config(decoder=True)
    counts = [value for name, value in text.to_dict().items() if "experts" in name and isinstance(value, int)]
    if max(counts, default=0) <= 1 or getattr(text, "is_moe", True) is False:
        return 0.0
    # JetMoE has a name of its own for the field.
    return getattr(text, "router_aux_loss_coef", getattr(text, "aux_loss_coef", None))
