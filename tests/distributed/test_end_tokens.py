"""The exported model stops where the rows that it learned end, by plain `generate()` with its own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.chat.encoder import ChatEncoder
from selfgen_ds.config import ModelConfig
from tests.chat_tokenizers import FAMILIES, tokenizer
from tests.distributed import runs
from tests.distributed.test_corrections import write_model
from tests.distributed.test_lora import with_stage
from tests.ranks import Ranks
from tests.tiers import matrix

QUESTION, ANSWER = "What is 12 + 30?", "It is 42."
CHAT = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
PLAIN = {"prompt": QUESTION, "completion": ANSWER}


def train(ranks: Ranks, folder: Path, row: dict[str, Any]) -> Path:
    """Train the model in `folder/model` until it knows a row by heart. Return the exported model."""
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    settings = runs.recipe(
        folder,
        model=ModelConfig(name_or_path=str(folder / "model"), dtype="float32"),
        selfgen=runs.SFT,
        deepspeed=with_stage(folder, 0),  # where a step of so small a model takes the least time
    )
    settings.train.max_steps, settings.train.micro_batch_size, settings.train.gradient_accumulation_steps = 60, 4, 1
    ranks.run(runs.run_training, settings)
    return Path(settings.output_dir) / "model"


def answer(exported: Path, prompt: list[int]) -> list[int]:
    """Return the greedy answer by plain `generate()`, which stops where the exported folder says."""
    model = AutoModelForCausalLM.from_pretrained(exported)
    return model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()


@matrix("family", FAMILIES)
def test_an_exported_chat_model_ends_its_turn(one_rank: Ranks, tmp_path: Path, family: str) -> None:
    chat_tokenizer, closing = tokenizer(family), FAMILIES[family].closing.strip()
    if "eos_token" not in FAMILIES[family].template:
        # The tokenizer's end token is not the one that closes a turn, as in base models that people give a template.
        chat_tokenizer.eos_token = next(t for t in FAMILIES[family].special if t != closing)
    write_model(tmp_path, chat_tokenizer, std=0.02)
    exported = train(one_rank, tmp_path, CHAT)
    ((ids, turns),) = ChatEncoder(chat_tokenizer, "all").encode([Conversation(messages=CHAT["messages"])])
    prompt = ids[: turns[-1][0]]  # not every template of these tokenizers writes a generation prompt
    text = chat_tokenizer.decode(answer(exported, prompt))
    assert (text.removesuffix(closing).strip(), text[-len(closing) :]) == (ANSWER, closing)


def test_an_exported_model_of_plain_rows_ends_its_answer(one_rank: Ranks, tmp_path: Path) -> None:
    path = Path(runs.write_model(tmp_path))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.5}))
    exported = train(one_rank, tmp_path, PLAIN)
    written = json.loads((exported / "generation_config.json").read_text())
    byte_level = AutoTokenizer.from_pretrained(exported)
    assert written["eos_token_id"] == [7, byte_level.eos_token_id]
    assert written["temperature"] == pytest.approx(0.5)
    found = answer(exported, byte_level(QUESTION)["input_ids"])
    assert byte_level.decode(found) == ANSWER + byte_level.eos_token
