"""Tiny models of many types, as values of `model.preset` without a vocabulary size."""

from __future__ import annotations

from typing import Any

from tests.tiers import sweep

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"} | _COMMON,
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True} | _COMMON,
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True} | _COMMON,
    "qwen3": {"model_type": "qwen3", "head_dim": 16} | _COMMON,
    "mistral": {"model_type": "mistral", "sliding_window": 8} | _COMMON,
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": 8} | _COMMON,
    "gemma2, untied": {
        "model_type": "gemma2",
        "head_dim": 16,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": False,
    }
    | _COMMON,
    "gemma3_text": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    | _COMMON,
    "phi": {"model_type": "phi"} | _COMMON,
    "phi3": {"model_type": "phi3"} | _COMMON,
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "cohere": {"model_type": "cohere", "logit_scale": 0.25} | _COMMON,
    "granite": {"model_type": "granite", "logits_scaling": 4.0, "tie_word_embeddings": False} | _COMMON,
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4} | _COMMON | _EXPERTS,
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,  # every second layer is dense
    }
    | _COMMON
    | _EXPERTS,
}


DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
"""Experts without a router loss, beside a dense layer; not one of the types that every test of a type runs."""
CTRL: dict[str, Any] = {"model_type": "ctrl", "n_embd": 32, "n_head": 2, "dff": 48, "n_layer": 2, "n_positions": 32}
"""A type without activation checkpointing, whose layers have numbers for names."""


# in `make check`: a plain model, one with capped scores and logits and a sliding window, and one with experts
_IN_CHECK = ("llama", "gemma2", "mixtral")
EVERY_ARCHITECTURE = sweep("name", [*_IN_CHECK, *(name for name in ARCHITECTURES if name not in _IN_CHECK)], check=3)


def attention(name: str) -> str:
    """Return the fastest attention of an architecture on a CPU: sdpa, which cannot cap scores as Gemma 2 does."""
    return "eager" if name.startswith("gemma2") else "sdpa"
