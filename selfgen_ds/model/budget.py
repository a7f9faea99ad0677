"""Memory that forwards take, so that forwards without a gradient need no more than the training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from selfgen_ds.model.attention import masks_packed_rows


@dataclass(frozen=True, kw_only=True)
class SweepBudget:
    """The number of tokens that one no-grad sweep may read and stay under the training step's peak memory.

    For each token, a no-grad forward holds the working set of one layer: the residual, the normed input, queries, keys,
    values and their rotated copies, or the gate, up projection, and product of the MLP. A training step with activation
    checkpointing holds the input of every layer (unless these wait in host memory) and, for the layer that is
    recomputed and goes backward, all saved tensors and their gradients. Without checkpointing, a training step holds
    the saved tensors of every layer. A forward also holds the buffer that ZeRO-3 prefetches parameters into; at the
    peak of the backward this buffer is free again.
    """

    forward: int
    """Elements that a no-grad forward holds per token."""
    training: int
    """Elements that a training step holds per token."""
    prefetched: int
    """Elements of ZeRO-3's prefetch buffer."""

    def tokens(self, micro_batch_tokens: int) -> float:
        """Return the tokens that a sweep may read, padding included.

        A tenth of the memory is left for ids, masks, and noise. One micro-batch always fits, because its training
        forward holds more.

        Args:
            micro_batch_tokens: Tokens of the largest micro-batch that is trained on, padding included.
        """
        fitting = 0.9 * (self.training * micro_batch_tokens - self.prefetched) / self.forward
        return max(fitting, micro_batch_tokens)


_FUSED = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu", None)  # activation functions that are one operation


def sweep_budget(
    config: PretrainedConfig,
    activation_checkpointing: bool,
    prefetched: int,
    packed_length: int | None = None,
    adapted: bool = False,
    offloaded: bool = False,
) -> SweepBudget:
    """Compute the budget of a transformer.

    Args:
        prefetched: Elements that ZeRO-3 gathers ahead: `stage3_prefetch_bucket_size`, at most the model's size.
        packed_length: Tokens of a packed row, whose attention mask has an entry for each pair of tokens; None without
            packing.
        adapted: Whether adapters are trained. Then a layer's forward also holds the output of its adapter, and a frozen
            layer without an adapter does not save its input.
        offloaded: Whether activation checkpointing keeps the layers' inputs in host memory.
    """
    if config._attn_implementation == "eager":  # the scores grow with the square of the length
        return SweepBudget(forward=1, training=1, prefetched=0)
    text = config.get_text_config(decoder=True)
    hidden, layers = text.hidden_size, text.num_hidden_layers
    fields = text.to_dict()
    width = max(hidden, _largest(text, "num_attention_heads", 1) * _largest_head(fields))
    inner, experts = inner_width(text)
    copies = experts * hidden if experts > 1 else 0  # the input of a token, copied for each of its experts
    saved = 4 * inner + 4 * hidden + 6 * width + 2 * copies
    if adapted:
        saved -= inner + hidden
    backward = 2 * inner + 2 * hidden + copies
    inputs = 0 if offloaded else layers * hidden
    kept = inputs + saved if activation_checkpointing else layers * saved
    # The gate, the up projection, and their product; an activation function of several operations holds more.
    held = 3 if fields.get("hidden_act", fields.get("activation_function")) in _FUSED else 5
    forward = max((held + adapted) * inner + 4 * hidden + 4 * copies, 2 * hidden + (8 if adapted else 6) * width)
    mask = 0
    if packed_length is not None and masks_packed_rows(config._attn_implementation):
        # One boolean mask for each kind of attention, and a copy of one of them in the dtype of the scores.
        mask = packed_length * (1 + len(set(getattr(text, "layer_types", None) or ["full"])))
    return SweepBudget(forward=forward + mask, training=kept + backward + mask, prefetched=prefetched)


def _largest_head(fields: dict) -> int:
    """Return the size of the largest attention head of any layer, 0 if the configuration names none.

    The queries of all heads together may be wider than the residual.

    Args:
        fields: The configuration as a dictionary: a head size that differs by layer is no attribute.
    """
    layers = [fields, *(fields.get("per_layer_config") or {}).values()]
    sizes = [size for layer in layers for name, size in layer.items() if name.endswith("head_dim") and size]
    return max(sizes, default=0)


def _largest(text: PretrainedConfig, name: str, default: int = 0) -> int:
    """Return the largest value of a field in any layer. A field that differs by layer is no attribute."""
    stored = text.attribute_map.get(name, name)
    fields = text.to_dict()
    values = [layer.get(stored) or 0 for layer in (fields, *(fields.get("per_layer_config") or {}).values())]
    return max(max(value) if isinstance(value, list) else value for value in values) or default


def inner_width(text: PretrainedConfig) -> tuple[int, int]:
    """Return the elements of the MLP's inner layer per token, over the token's experts, and their number."""

    def largest(*names: str) -> int:
        return next((value for name in names if (value := _largest(text, name))), 0)

    dense = largest("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * text.hidden_size
    experts = largest("num_experts_per_tok", "moe_topk", "moe_k") or 1
    shared = largest("shared_expert_intermediate_size")
    return max(dense, experts * (largest("moe_intermediate_size") or dense) + shared), experts


def token_bytes(config: PretrainedConfig, item_size: int) -> int:
    """Return the memory that a no-grad forward holds per token, in bytes: a generous bound for every kind of model."""
    text = config.get_text_config(decoder=True)
    inner, experts = inner_width(text)
    return (5 * inner + (6 + 4 * experts) * text.hidden_size) * item_size


def row_bytes(config: PretrainedConfig, item_size: int, longest: int) -> int:
    """Return the memory to read `longest` prompt tokens and to draw the next token, in bytes, without the cache."""
    text = config.get_text_config(decoder=True)
    # A layer's mask and a copy in the dtype of the scores; eager attention also has scores, in two dtypes.
    heads = _largest(text, "num_attention_heads", 1)
    scores = heads * (4 + item_size) if config._attn_implementation == "eager" else 0
    pair = 1 + item_size + scores if masks_packed_rows(config._attn_implementation) else 0
    logits = 24 * text.vocab_size  # as the model gives them, warped, as probabilities, and summed in float64
    return longest * (token_bytes(config, item_size) + longest * pair) + logits


def one_token_cache(model: PreTrainedModel) -> Cache | None:
    """Return the cache that the model keeps for one row of one token.

    Collective if the weights are sharded: every rank must call this, because it runs a forward.
    """
    output = model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True)
    return output.get("past_key_values", output.get("cache_params"))


def cache_bytes(cache: Cache | None, longest: int) -> int:
    """Return the size of the cache of one row of `longest` tokens, in bytes.

    Args:
        cache: The cache of one row of one token.
    """
    total = 0
    for layer in [] if cache is None else cache.layers:
        tokens = min(longest, getattr(layer, "sliding_window", longest))
        for name, value in vars(layer).items():
            size = sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
            # Any other tensor is a state whose size does not depend on the number of tokens.
            total += size * (tokens if name in ("keys", "values", "indexer_keys") else 1)
    return total


def split_rows(lengths: Tensor, most: float) -> list[Tensor]:
    """Split rows into the fewest groups of at most `most` tokens each, padding included.

    Args:
        lengths: `[rows]` int64, tokens of each row. Rows of length 0 are in no group.

    Returns:
        The numbers of each group's rows, int64. A group has at least one row, whatever its length.
    """
    order = lengths.argsort(descending=True, stable=True)
    groups: list[list[int]] = []
    longest = 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length == 0:
            break
        if not groups or (len(groups[-1]) + 1) * longest > most:
            groups.append([])
            longest = length
        groups[-1].append(row)
    return [torch.tensor(group) for group in groups]
