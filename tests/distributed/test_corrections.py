"""A model corrects its answers as plain transformers do, on any number of ranks; impossible requests are refused."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from selfgen_ds import evaluate
from selfgen_ds.config import EvaluateOptions
from selfgen_ds.data.correction import TEXT_CUE, TURN_CUE
from selfgen_ds.data.tokenizer import byte_tokenizer
from tests.chat_tokenizers import tokenizer
from tests.distributed import runs
from tests.ranks import Ranks

QUESTIONS = {
    "How many apples are left?": "There are three.",
    "What is 12 + 30?": "It is 42.",
    "Is it?": "Yes, it is the answer to the question.",
    "Thank you!": "You are welcome, and the same to you.",
    "And now?": "no",
}


def write_model(folder: Path, its_tokenizer: PreTrainedTokenizerFast, positions: int = 256, std: float = 0.3) -> Path:
    """Save a model with random weights that are large enough for answers that differ by prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **runs.PRESET | {"max_position_embeddings": positions},
        vocab_size=len(its_tokenizer),
        bos_token_id=None,
        eos_token_id=its_tokenizer.eos_token_id,
        initializer_range=std,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    its_tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def write_texts(folder: Path) -> Path:
    rows = [{"prompt": question, "completion": answer} for question, answer in QUESTIONS.items()]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "texts.jsonl"


def write_conversations(folder: Path) -> Path:
    with open(folder / "chats.jsonl", "w", encoding="utf-8") as file:
        for question, answer in QUESTIONS.items():
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder / "chats.jsonl"


def evaluated(options: EvaluateOptions) -> str:
    """Return the error message, if there is an error."""
    try:
        evaluate.run(options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def greedy(model: Any, ids: list[int], longest: int) -> list[int]:
    """Return the greedy answer of plain transformers."""
    settings = GenerationConfig(
        max_new_tokens=longest, eos_token_id=model.config.eos_token_id, pad_token_id=model.config.eos_token_id
    )
    return model.generate(torch.tensor([ids]), generation_config=settings)[0, len(ids) :].tolist()


def test_conversations_are_corrected_as_plain_transformers_would(
    one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    chat_tokenizer = tokenizer("chatml")
    path = write_model(tmp_path, chat_tokenizer)
    data = str(write_conversations(tmp_path))
    for ranks, name, batch_size in ((one_rank, "one", 5), (two_ranks, "two", 1)):
        out = str(tmp_path / name)
        options = EvaluateOptions(
            model=str(path), data=data, output_dir=out, correction_rounds=2, batch_size=batch_size
        )
        assert set(ranks.run(evaluated, options)) == {""}
    one, two = (
        [[r["answer"], *chain(*r["other_answers"].values())] for r in predictions(tmp_path / n)] for n in ("one", "two")
    )
    assert one == two

    model = AutoModelForCausalLM.from_pretrained(path)
    changed = 0
    longest = max(len(chat_tokenizer(answer)["input_ids"]) + 1 for answer in QUESTIONS.values())
    for answers, question in zip(one, QUESTIONS, strict=True):
        messages = [{"role": "user", "content": question}]
        prompt = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        answer = greedy(model, prompt, longest)
        asked = [{"role": "user", "content": TURN_CUE}]
        cue = chat_tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        expected = []
        for _ in range(3):
            expected.append(chat_tokenizer.decode(answer, skip_special_tokens=True))
            content = answer[:-1] if answer[-1] == chat_tokenizer.eos_token_id else answer
            asked_ids = chat_tokenizer("<|im_end|>\n" + cue)["input_ids"]
            answer = greedy(model, prompt + content + asked_ids, longest)
        assert answers == expected
        changed += expected[0] != expected[1]
    assert changed


def test_texts_are_corrected_and_the_rates_are_written(
    one_rank: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, data = write_model(tmp_path, byte_tokenizer()), str(write_texts(tmp_path))
    options = EvaluateOptions(model=str(path), data=data, output_dir=str(tmp_path), correction_rounds=1)
    assert one_rank.run(evaluated, options) == [""]
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    names = ["exact_match", "wrong_to_right", "right_to_wrong", "unchanged"]
    assert {f"corrected_1_{name}" for name in [*names, "rouge_l", "bleu"]} <= metrics.keys()
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000

    model, bytes_ = AutoModelForCausalLM.from_pretrained(path), byte_tokenizer()
    longest = max(len(bytes_(answer)["input_ids"]) + 1 for answer in QUESTIONS.values())
    for row, question in zip(predictions(tmp_path), QUESTIONS, strict=True):
        prompt = bytes_(question)["input_ids"]
        answer = greedy(model, prompt, longest)
        content = answer[:-1] if answer[-1] == bytes_.eos_token_id else answer
        corrected = greedy(model, prompt + content + bytes_(TEXT_CUE)["input_ids"], longest)
        assert row["other_answers"]["corrected_1"] == [bytes_.decode(corrected, skip_special_tokens=True)]
        unchanged = row["other_answers"]["corrected_1"] == [row["answer"]]
        assert row["metrics"]["corrected_1_unchanged"] == float(unchanged)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"correction_rounds": -1}, "InputError: --correction_rounds: expected 0 or more, got -1"),
        ({"cue": "Sure?"}, "InputError: --cue: expected --correction_rounds as well"),
        ({"correction_rounds": 1, "cue": "x" * 250}, "InputError: --correction_rounds: "),
    ],
)
def test_an_invalid_request_for_corrections_is_one_clear_line(
    one_rank: Ranks, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    path, data = write_model(tmp_path, byte_tokenizer()), str(write_texts(tmp_path))
    options = EvaluateOptions(model=str(path), data=data, output_dir=str(tmp_path / "out"), **changes)
    (message,) = one_rank.run(evaluated, options)
    assert message.startswith(expected)
    assert "\n" not in message
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_smaller_max_length_makes_room_for_corrections(one_rank: Ranks, tmp_path: Path) -> None:
    path, data = write_model(tmp_path, byte_tokenizer(), positions=96), str(write_texts(tmp_path))
    messages = {}
    for max_length in (None, 30):
        options = EvaluateOptions(
            model=str(path), data=data, output_dir=str(tmp_path), correction_rounds=1, max_length=max_length
        )
        (messages[max_length],) = one_rank.run(evaluated, options)
    assert "a smaller --max_length" in messages[None]
    assert "the model has 96 positions" in messages[None]
    assert messages[30] == ""
