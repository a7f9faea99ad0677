"""The causal LM's forward, extended by reductions that run at the LM head."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from selfgen_ds.errors import InputError
from selfgen_ds.model.head import LMHead, LogitTransform, Reduction


def add_reductions(model: PreTrainedModel, form: LogitTransform | None = None) -> PreTrainedModel:
    """Let `model(ids, positions=..., reduction=...)` reduce the hidden states at some positions at the LM head.

    In place: names of parameters, class name and the plain forward stay what they were, so checkpoints, exports
    and `generate()` do too. The class is swapped for a subclass, as torch's FSDP2 does.

    Raises:
        InputError: The output layer is not a linear one.
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
    model.set_output_embeddings(LMHead(output, form))
    model.router_loss_coefficient = router_loss_coefficient(model.config) or 0.0
    return model


def _reduce(
    model: PreTrainedModel,
    reduction: Reduction,
    context: Tensor,
    positions: Tensor,
    position_ids: Tensor | None = None,
    routed: Tensor | None = None,
) -> Any:
    """`reduction` over the hidden states that predict the tokens at `positions`.

    Args:
        context: `[B, L]` int64, rows padded on the right.
        positions: `[B, L]` bool, False at position 0. The token at t is predicted from those before it.
        position_ids: `[B, L]` int64, for packed rows only: from 0 for each sample.
        routed: `[B, L]` bool, the real tokens: asks for a mixture of experts' router loss over them, but for the
            last one of a row, which nothing is predicted from.

    Returns:
        What `reduction` gives; with `routed`, that and the router loss, a scalar without its coefficient.
    """
    where = None if position_ids is None else position_ids[:, :-1]
    settings = {} if routed is None else {"output_router_logits": True}
    output = backbone(model, context[:, :-1], where, **settings)
    result = model.get_output_embeddings()(output.last_hidden_state[positions[:, 1:]], reduction)
    return result if routed is None else (result, _router_loss(model, output.router_logits, routed[:, 1:]))


def backbone(model: PreTrainedModel, context: Tensor, position_ids: Tensor | None, **settings: Any) -> Any:
    """The output of the model without its head, whose `last_hidden_state` is `[B, L, H]`.

    Packed samples are kept apart by transformers if it gets no mask and no cache, and by flash attention only
    in a single row.
    """
    shape = context.shape
    if position_ids is not None:
        settings["position_ids"] = position_ids
        if "flash" in model.config._attn_implementation:
            context, settings["position_ids"] = context.reshape(1, -1), position_ids.reshape(1, -1)
    # Llama 4's causal LM names its backbone wrongly, and is its own base model
    base = model.base_model if model.base_model is not model else model.model
    output = base(input_ids=context, attention_mask=None, use_cache=False, **settings)
    output.last_hidden_state = output.last_hidden_state.reshape(*shape, -1)
    return output


def _router_loss(model: PreTrainedModel, router_logits: tuple[Tensor, ...], routed: Tensor) -> Tensor:
    """The load balancing loss as the model's own module has it; 0 where there is no real token."""
    some = routed.any()
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    loss = function(
        router_logits,
        num_experts=model.num_experts,
        top_k=model.num_experts_per_tok,
        attention_mask=routed | ~some,  # the mean over no token would be NaN
    )
    return loss * some


def router_loss_coefficient(config: PretrainedConfig) -> float | None:
    """What a mixture of experts' load balancing loss is multiplied by, 0 for other models.

    None: there are experts, but no coefficient.
    """
    text = config.get_text_config(decoder=True)
    counts = [value for name, value in text.to_dict().items() if "experts" in name and isinstance(value, int)]
    if max(counts, default=0) <= 1 or getattr(text, "is_moe", True) is False:
        return 0.0
    # JetMoE has its own name for it
    return getattr(text, "router_aux_loss_coef", getattr(text, "aux_loss_coef", None))
