"""The plan of a pilot: what is tried before its first run."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from selfgen_ds.config import ModelConfig
from selfgen_ds.model.loading import vocabulary
from selfgen_ds.pilot.planning import _random_model


def test_a_random_model_has_embeddings_for_all_ids_of_a_larger_tokenizer(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=200, **sizes)).save_pretrained(tmp_path / "base")
    model = ModelConfig(name_or_path=str(tmp_path / "base"), tokenizer="byte", resize_embeddings=True, dtype="float32")
    folder = _random_model(model, tmp_path / "start")
    needed = vocabulary(AutoTokenizer.from_pretrained(folder))
    assert needed > 200
    assert AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().num_embeddings == needed
