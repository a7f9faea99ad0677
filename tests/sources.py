"""Tiny model folders that plain transformers loads, but whose tensors are not those that the model's class expects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from selfgen_ds.data.tokenizer import byte_tokenizer
from tests.architectures import ARCHITECTURES
from tests.distributed import runs

_TEXT: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 256,
}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": 28, "patch_size": 14}
_COMPOSITE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _TEXT,
        "vision_config": _VISION,
        "image_token_index": 250,
        "boi_token_index": 251,
        "eoi_token_index": 252,
        "mm_tokens_per_image": 4,
    },
    "llama4": {
        "text_config": _TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 2, "moe_layers": [1]},
        "vision_config": _VISION
        | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "pixel_shuffle_ratio": 0.5},
        "image_token_index": 250,
        "router_aux_loss_coef": 0.0,  # as the refusal of the type's router loss advises
    },
    "qwen3_5": {
        "text_config": _TEXT
        | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4}
        | {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2}
        | {"out_hidden_size": 32, "num_position_embeddings": 16},
        "image_token_id": 250,
        "video_token_id": 251,
        "vision_start_token_id": 252,
        "vision_end_token_id": 253,
    },
}


def tensors(folder: Path | str) -> dict[str, torch.Tensor]:
    """Read all tensors of a model's folder."""
    return {n: t for path in Path(folder).glob("*.safetensors") for n, t in load_file(path).items()}


def write(folder: Path, content: dict[str, torch.Tensor]) -> None:
    """Replace the tensors of a model's folder."""
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def _own_head(folder: Path) -> Path:
    path = Path(runs.write_model(folder, tie_word_embeddings=True))
    write(path, tensors(path) | {"lm_head.weight": torch.randn(258, 32)})
    return path


def _same_head(folder: Path) -> Path:
    path = Path(runs.write_model(folder, tie_word_embeddings=True))
    write(path, tensors(path) | {"lm_head.weight": tensors(path)["model.embed_tokens.weight"].clone()})
    return path


def _more_layers(folder: Path) -> Path:
    path = Path(runs.write_model(folder, num_hidden_layers=2))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    return path


def _composite(folder: Path, model_type: str) -> Path:
    torch.manual_seed(0)
    path = folder / "model"
    config = AutoConfig.for_model(model_type, **_COMPOSITE[model_type])
    AutoModelForImageTextToText.from_config(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def _backbone_names(folder: Path) -> Path:
    """Write a folder as that of the published GPT-2, whose names are those of the model without its head."""
    path = Path(runs.write_model_of(folder, ARCHITECTURES["gpt2"]))
    write(path, {name.removeprefix("transformer."): tensor for name, tensor in tensors(path).items()})
    return path


SOURCES: dict[str, Callable[[Path], Path]] = {
    "a head of its own under tied embeddings": _own_head,
    "the embeddings twice": _same_head,
    "more layers than the model has": _more_layers,
    "a vision tower that the text model does not take": lambda folder: _composite(folder, "qwen3_5"),
    "names without the backbone's prefix": _backbone_names,
    "experts beside a vision tower": lambda folder: _composite(folder, "llama4"),
    "a vision tower that text does not reach": lambda folder: _composite(folder, "gemma3"),
}
"""Kind of folder -> function that writes one into an empty folder, and returns its path."""
