"""What forwards hold in memory, so that those without a gradient need no more than the training step."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class SweepBudget:
    """How large a no-grad sweep may be to stay under the training step's peak memory. In elements.

    A no-grad forward holds one layer's working set a token: the residual, the normed input, queries, keys,
    values and their rotated copies, or the MLP's gate, up and product. A training step with checkpointing holds
    every layer's input (unless these wait in host memory) and, while one layer is recomputed and goes backward, all
    that it saved and the gradients of it; without checkpointing, what every layer saved. A forward also holds the
    buffer that ZeRO-3 prefetches parameters into; by the backward's peak it is gone.
    """

    forward: int
    """Of a no-grad forward, a token."""
    training: int
    """Of a training step, a token."""
    prefetched: int
    """ZeRO-3's prefetch buffer."""

    def tokens(self, micro_batch_tokens: int) -> float:
        """Tokens of a sweep, padding included, given those of the largest micro-batch that is trained on.

        A tenth is left for ids, masks and noise. One micro-batch always fits: its training forward holds more.
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
    """The budget of a transformer.

    Args:
        prefetched: Elements that ZeRO-3 gathers ahead (`stage3_prefetch_bucket_size`, at most the model).
        packed_length: Tokens of a packed row, which has a mask of all its pairs of tokens; None without packing.
        adapted: Whether adapters are trained. A layer's forward then also holds the adapter's output beside its own,
            and a frozen layer without one does not save its input.
        offloaded: Whether the layers' inputs that checkpointing keeps are in host memory.
    """
    if config._attn_implementation == "eager":  # holds scores that grow with the square of the length
        return SweepBudget(forward=1, training=1, prefetched=0)
    text = config.get_text_config(decoder=True)
    hidden, layers = text.hidden_size, text.num_hidden_layers
    heads = getattr(text, "num_attention_heads", 1)
    fields = text.to_dict()  # where it may differ by layer, the attribute raises
    layers_fields = [fields, *(fields.get("per_layer_config") or {}).values()]
    head_sizes = [v for some in layers_fields for n, v in some.items() if n.endswith("head_dim") and v]
    width = max(hidden, heads * max(head_sizes, default=0))  # queries may be wider than the residual
    inner, experts = inner_width(text)
    copies = experts * hidden if experts > 1 else 0  # a token's input for each of its experts
    saved = 4 * inner + 4 * hidden + 6 * width + 2 * copies
    if adapted:
        saved -= inner + hidden
    backward = 2 * inner + 2 * hidden + copies
    inputs = 0 if offloaded else layers * hidden
    kept = inputs + saved if activation_checkpointing else layers * saved
    # gate, up and product; or what an activation function that is written out in steps holds
    held = 3 if fields.get("hidden_act", fields.get("activation_function")) in _FUSED else 5
    forward = max((held + adapted) * inner + 4 * hidden + 4 * copies, 2 * hidden + (8 if adapted else 6) * width)
    mask = 0
    if packed_length is not None and "flash" not in config._attn_implementation:
        # a boolean mask for each kind of attention, and its copy in the type of the scores
        mask = packed_length * (1 + len(set(getattr(text, "layer_types", None) or ["full"])))
    return SweepBudget(forward=forward + mask, training=kept + backward + mask, prefetched=prefetched)


def inner_width(text: PretrainedConfig) -> tuple[int, int]:
    """Elements of an MLP's inner layer that a token goes through, and the experts that it goes to."""

    def largest(*names: str) -> int:
        value = next((v for name in names if (v := getattr(text, name, None))), 0)
        return max(value) if isinstance(value, list) else value

    dense = largest("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * text.hidden_size
    experts = largest("num_experts_per_tok", "moe_topk", "moe_k") or 1
    shared = largest("shared_expert_intermediate_size")
    return max(dense, experts * (largest("moe_intermediate_size") or dense) + shared), experts


def token_bytes(config: PretrainedConfig, item_size: int) -> int:
    """What a no-grad forward holds of a token at most: as in `sweep_budget`, but for every model, generously."""
    text = config.get_text_config(decoder=True)
    inner, experts = inner_width(text)
    return (5 * inner + (6 + 4 * experts) * text.hidden_size) * item_size


def row_bytes(config: PretrainedConfig, item_size: int, longest: int) -> int:
    """What the forward over a prompt of so many tokens and the draw of a token behind it hold, without the cache."""
    text = config.get_text_config(decoder=True)
    # a layer's mask and its copy in the type of the scores; eager attention has scores as well, in two types
    heads = getattr(text, "num_attention_heads", 1)
    pair = {"eager": 1 + item_size + heads * (4 + item_size), "flash_attention_2": 0}.get(
        config._attn_implementation, 1 + item_size
    )
    logits = 24 * text.vocab_size  # as they come, warped, as probabilities, summed in float64
    return longest * (token_bytes(config, item_size) + longest * pair) + logits
