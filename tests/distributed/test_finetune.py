"""The first hour with a pretrained chat model, command by command, with a small model in the place of a real one."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import chat_tokenizers
from tests.distributed import runs
from tests.forked import command

pytestmark = pytest.mark.test


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a Llama with random weights and a chat template."""
    tokenizer = chat_tokenizers.tokenizer("chatml")
    torch.manual_seed(0)
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    fields = runs.PRESET | {"model_type": "llama", "vocab_size": len(tokenizer)} | special
    folder = tmp_path_factory.mktemp("chat") / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with conversations, and with the same rows as two columns of a CSV file."""
    with open(tmp_path / "chat.jsonl", "w") as chat, open(tmp_path / "two.csv", "w") as two:
        two.write("question,answer\n")
        for i in range(12):
            question, answer = f"What is {i} and 1?", f"It is {i + 1}."
            pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            chat.write(json.dumps({"messages": pair}) + "\n")
            two.write(f"{question},{answer}\n")
    return tmp_path


def _selfgen_ds(folder: Path, *arguments: str) -> str:
    """Run a command, and return what it printed."""
    code = command(list(arguments), folder / "log")
    output = (folder / "log").read_text()
    assert code == 0, output[-3000:]
    return output


def _train(folder: Path, chat_model: str, name: str, *options: str) -> str:
    """Train two steps with the recipe for fine-tuning, and return what was printed."""
    model = ["--model.name_or_path", chat_model, "--data.max_length", "128"]
    length = ["--train.max_steps", "2", "--output_dir", str(folder / name)]
    return _selfgen_ds(folder, "train", "--config", "finetune", *model, *length, *options)


CHAT = ("--data.train", "{folder}/chat.jsonl")
TWO = ("--data.train", "{folder}/two.csv", "--data.prompt_column", "question", "--data.completion_column", "answer")


def _given(options: tuple[str, ...], folder: Path) -> list[str]:
    return [option.format(folder=folder) for option in options]


@pytest.mark.timeout(400)
def test_a_chat_model_is_inspected_trained_asked_evaluated_and_compared(chat_model: str, folder: Path) -> None:
    rows = f"{folder}/chat.jsonl"
    shown = _selfgen_ds(
        folder, "inspect", "--model.name_or_path", chat_model, "--data.train", rows, "--data.max_length", "128"
    )
    assert "12 rows read, 12 used (0 truncated), 0 refused; responses end with <|im_end|>" in shown

    printed = _train(folder, chat_model, "tuned", *_given(CHAT, folder), "--data.eval", rows)
    assert "step 2, prompt: " in printed, "answers of evaluation rows are logged"
    asked = printed.rsplit("to ask it: selfgen-ds ", 1)[1].splitlines()[0]
    assert "--as_chat" not in asked
    assert "<|im_start|>" not in _selfgen_ds(
        folder, *shlex.split(asked), "--prompt", "What is 3 and 1?", "--max_new_tokens", "8"
    )

    for model, name in ((chat_model, "base"), (str(folder / "tuned" / "model"), "tuned")):
        _selfgen_ds(folder, "evaluate", "--model", model, "--data", rows, "--output_dir", str(folder / name))
    _selfgen_ds(
        folder, "compare", str(folder / "base"), str(folder / "tuned"), "--output_dir", str(folder / "comparison")
    )
    base, tuned = (json.loads((folder / name / "evaluation.json").read_text()) for name in ("base", "tuned"))
    assert tuned["metrics"]["loss"] < base["metrics"]["loss"]


@pytest.mark.timeout(300)
def test_two_columns_in_the_chat_template_train_as_the_same_conversations(chat_model: str, folder: Path) -> None:
    _train(folder, chat_model, "chat", *_given(CHAT, folder))
    asked = _train(folder, chat_model, "two", *_given(TWO, folder))
    assert runs.losses(folder / "two") == runs.losses(folder / "chat")
    assert "--as_chat false" not in asked


@pytest.mark.timeout(200)
def test_a_model_that_learned_plain_texts_is_asked_in_plain_text(chat_model: str, folder: Path) -> None:
    template = ["--data.prompt_template", "Q: {prompt}\nA: "]
    printed = _train(folder, chat_model, "plain", *_given(TWO, folder), *template, "--data.as_chat", "false")
    asked = printed.rsplit("to ask it: ", 1)[1]
    expected = ["--as_chat", "false", "--prompt_template", "Q: {prompt}\nA: "]
    assert shlex.split(asked)[4:8] == expected


@pytest.mark.timeout(200)
def test_a_model_without_a_template_is_evaluated_with_one_on_rows_of_which_some_are_broken(
    chat_model: str, folder: Path
) -> None:
    plain = folder / "plain"
    shutil.copytree(chat_model, plain)
    (plain / "chat_template.jinja").rename(folder / "template.jinja")
    with open(folder / "chat.jsonl", "a") as file:
        file.write('{"messages": []}\n')
    rows = ["--data", f"{folder}/chat.jsonl", "--max_refused_share", "0.1", "--output_dir", str(folder / "scores")]
    template = ["--chat_template", str(folder / "template.jinja")]
    printed = _selfgen_ds(folder, "evaluate", "--model", str(plain), *template, *rows)
    assert "chat.jsonl, line 13, field 'messages': expected a list of messages, got none" in printed
    result = json.loads((folder / "scores" / "evaluation.json").read_text())
    assert (result["n"], result["refused"]) == (12, 1)
    _selfgen_ds(folder, "generate", "--model", str(plain), *template, "--prompt", "Hello", "--max_new_tokens", "4")
