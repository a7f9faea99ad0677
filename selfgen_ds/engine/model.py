"""The causal LM: created sharded under ZeRO-3, its forward extended by reductions at the LM head."""

from __future__ import annotations

import functools
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selfgen_ds.config import InputError, LoraConfig, ModelConfig
from selfgen_ds.engine import lora
from selfgen_ds.engine.head import LMHead, Reduction


def model_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The `transformers` configuration of the recipe's model, without its weights.

    Raises:
        InputError: It cannot be loaded, is no Llama, or the tokenizer has ids that it has no embedding for.
    """
    if model.name_or_path is None:
        assert model.preset is not None
        try:
            config: PretrainedConfig = LlamaConfig(
                **{
                    "vocab_size": len(tokenizer),
                    "bos_token_id": tokenizer.bos_token_id,
                    "eos_token_id": tokenizer.eos_token_id,
                    "pad_token_id": tokenizer.pad_token_id,
                }
                | model.preset
            )
        except Exception as error:  # the field that is wrong is in the message; its type differs by field
            raise InputError(f"model.preset: {' '.join(str(error).split())}") from error
        unknown = set(model.preset) - set(LlamaConfig().to_dict())
        if unknown:
            raise InputError(f"model.preset: not fields of a Llama configuration: {', '.join(sorted(unknown))}")
    else:
        try:
            name = lora.base_of(model.name_or_path)
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
    if config.model_type != "llama":
        raise InputError(f"model: expected a Llama, got model type {config.model_type!r}")
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"model.tokenizer: {len(tokenizer)} tokens, but the model has embeddings for {config.vocab_size}"
        )
    return config


def parameter_count(config: PretrainedConfig, adapter: LoraConfig | None = None) -> int:
    """Trained parameters of the model that a configuration describes; nothing is allocated.

    Raises:
        InputError: There is no such model, or the adapter does not fit it.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # torch's and transformers' types differ by what is wrong
        raise InputError(f"model: cannot be built: {' '.join(str(error).split())}") from error
    if adapter is not None:
        with torch.device("meta"):
            lora.add_adapter(model, adapter, "")
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_model(model: ModelConfig, config: PretrainedConfig) -> PreTrainedModel:
    """The model with its weights, on this rank's shard alone where a ZeRO-3 `HfDeepSpeedConfig` is alive.

    The caller seeds torch first (from scratch, weights depend on the seed and on whether the stage is 3, not on
    the world size), and again afterwards: initialisation leaves the ranks with different generator states.

    Raises:
        InputError: Weights are missing or do not fit.
    """
    dtype = getattr(torch, model.dtype)
    if model.name_or_path is None:
        built = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=model.attn_implementation)
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
    return extend(built).train()  # `from_pretrained` leaves it in eval mode, where nothing is checkpointed


def extend(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model(ids, positions=..., reduction=...)` reduce the hidden states at some positions at the LM head.

    In place: names of parameters, class name and the plain forward stay what they were, so checkpoints, exports
    and `generate()` do too. The class is swapped for a subclass, as torch's FSDP2 does.
    """
    plain = type(model)

    @functools.wraps(plain.forward)  # `generate()` reads the signature
    def forward(self: PreTrainedModel, *args: Any, reduction: Reduction | None = None, **kwargs: Any) -> Any:
        return plain.forward(self, *args, **kwargs) if reduction is None else _reduce(self, reduction, *args, **kwargs)

    model.__class__ = type(plain.__name__, (plain,), {"forward": forward, "__module__": plain.__module__})
    model.set_output_embeddings(LMHead(model.get_output_embeddings()))
    return model


def _reduce(model: PreTrainedModel, reduction: Reduction, context: Tensor, positions: Tensor) -> Any:
    """`reduction` over the hidden states that predict the tokens at `positions`.

    Args:
        context: `[B, L]` int64, rows padded on the right.
        positions: `[B, L]` bool, False at position 0. The token at t is predicted from those before it.
    """
    hidden = model.base_model(input_ids=context[:, :-1], use_cache=False).last_hidden_state
    return model.lm_head(hidden[positions[:, 1:]], reduction)
