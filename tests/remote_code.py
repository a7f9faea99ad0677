"""A model whose code comes with its folder: a Llama with lists of experts, of which each row runs some."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from selfgen_ds.data.tokenizer import byte_tokenizer
from tests.distributed import runs

CODE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class ListMoeConfig(LlamaConfig):
    model_type = "list_moe"


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, 16, bias=False)
        self.experts = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(16))

    def forward(self, hidden):
        weights, chosen = self.gate(hidden).softmax(dim=-1).max(dim=-1)
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            routed = chosen == number
            if routed.any():
                output[routed] = expert(hidden[routed]) * weights[routed][:, None]
        return output


class ListMoeForCausalLM(LlamaForCausalLM):
    config_class = ListMoeConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Experts(config)
        self.post_init()
"""


def write_list_moe(folder: Path) -> Path:
    """Write the folder of a tiny random model with its code."""
    path = folder / "model"
    path.mkdir()
    (path / "modeling_list_moe.py").write_text(CODE)
    tokenizer = byte_tokenizer()
    fields = runs.PRESET | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    names = {"AutoConfig": "ListMoeConfig", "AutoModelForCausalLM": "ListMoeForCausalLM"}
    auto_map = {key: f"modeling_list_moe.{name}" for key, name in names.items()}
    config = fields | {"model_type": "list_moe", "auto_map": auto_map, "bos_token_id": None, "pad_token_id": None}
    (path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    loaded = AutoConfig.from_pretrained(path, trust_remote_code=True)
    AutoModelForCausalLM.from_config(loaded, trust_remote_code=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
