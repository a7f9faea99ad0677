"""`generate`: answers as plain transformers gives them, to a prompt, a file of prompts, or what is typed."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from selfgen_ds import generate
from selfgen_ds.config import GenerateOptions
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from tests.distributed import runs

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.write_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = runs.write_model(tmp_path_factory.mktemp("chat"))
    (Path(folder) / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _run(**options: Any) -> None:
    generate.run(GenerateOptions(max_new_tokens=6, **options))


def _expected(folder: str, prompt: str) -> str:
    """Return the greedy answer."""
    return TOKENIZER.decode(_greedy(folder, prompt), skip_special_tokens=True)


def _greedy(folder: str, prompt: str) -> list[int]:
    """Return the greedy answer, which is made token by token."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = TOKENIZER(prompt)["input_ids"]
    written: list[int] = []
    while len(written) < 6 and TOKENIZER.eos_token_id not in written:
        with torch.no_grad():
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


def test_a_prompt_is_answered_greedily(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    _run(model=model, prompt="ask 1: ")
    assert capsys.readouterr().out.strip() == _expected(model, "ask 1: ").strip()


@pytest.mark.parametrize(("as_chat", "read"), [(None, "[user]hello[assistant]"), (False, "hello")])
def test_a_prompt_stands_in_the_chat_template(
    chat_model: str, as_chat: bool | None, read: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(model=chat_model, prompt="hello", as_chat=as_chat)
    assert capsys.readouterr().out.strip() == _expected(chat_model, read).strip()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "one\n\ntwo\n"),
        ("prompts.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n'),
        ("prompts.csv", "prompt\none\ntwo\n"),
    ],
)
def test_every_prompt_of_a_file_is_answered(model: str, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    _run(model=model, prompts=str(tmp_path / name), output=str(tmp_path / "answers.jsonl"))
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["one", "two"]
    assert [answer["answer"] for answer in answers] == [_expected(model, prompt) for prompt in ("one", "two")]


def test_a_field_of_rows_and_a_template_make_the_prompts(model: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,other\none,x\n")
    output = tmp_path / "answers.jsonl"
    template = "Q: {prompt}\nA:"
    _run(
        model=model,
        prompts=str(tmp_path / "rows.csv"),
        prompt_column="question",
        prompt_template=template,
        output=str(output),
    )
    answer = json.loads(output.read_text())
    assert (answer["prompt"], answer["answer"]) == ("one", _expected(model, "Q: one\nA:"))


def test_a_prompt_template_stands_inside_the_chat_template(chat_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    _run(model=chat_model, prompt="hello", prompt_template="<{prompt}>")
    assert capsys.readouterr().out.strip() == _expected(chat_model, "[user]<hello>[assistant]").strip()


def test_rows_of_messages_are_continued(chat_model: str, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    _run(model=chat_model, prompts=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "answers.jsonl"))
    (answer,) = (json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines())
    assert answer["answer"] == _expected(chat_model, "[system]a[user]b[assistant]")


def test_what_is_typed_is_one_conversation_until_an_empty_line(
    chat_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n\nc\n"))
    _run(model=chat_model)
    first = _expected(chat_model, "[user]a[assistant]")
    second = _expected(chat_model, f"[user]a[assistant]{first}[user]b[assistant]")
    third = _expected(chat_model, "[user]c[assistant]")
    shown = capsys.readouterr().out
    assert [text for text in (first, second, third) if text.strip() not in shown] == []


def test_sampled_answers_depend_on_the_seed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in (1, 1, 2):
        _run(model=model, prompt="ask 1: ", temperature=5.0, seed=seed)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prompt": "a", "prompts": "b"}, "--prompts: expected no --prompt as well"),
        ({"prompt": "a", "output": "b"}, "--output: expected --prompts as well"),
        ({"prompt": "a", "prompt_template": "b"}, "--prompt_template: expected a text with {prompt} in it, got 'b'"),
        ({"prompt": "a", "temperature": -1.0}, "--temperature: expected 0 or more, got -1.0"),
        (
            {"prompts": "a.txt", "output": "none/b.jsonl"},
            "--output: expected a file in an existing folder, got 'none/b.jsonl'",
        ),
        ({"prompts": "none.txt"}, "--prompts: expected a file, got 'none.txt'"),
        ({"prompt": "a", "as_chat": True}, "--as_chat: expected a model with a chat template"),
    ],
)
def test_a_wrong_option_is_refused(model: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        _run(model=model, **options)
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.md", "x", "expected a file that ends in .txt, .jsonl"),
        ("a.txt", "\n", "expected prompts, got none"),
        ("a.txt", b"\xff\xff", "cannot be read: 'utf-8'"),
        ("a.jsonl", '{"messages": [{"role": 5}]}', "line 1, field 'messages', message 1: expected a role"),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "b"}]}',
            "line 1, field 'messages': expected a message to answer at the end, got the assistant's",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "line 1: messages need a model with a chat template (--chat_template)",
        ),
    ],
)
def test_a_wrong_file_of_prompts_is_refused(model: str, tmp_path: Path, name: str, content: Any, problem: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        _run(model=model, prompts=str(tmp_path / name))
    assert str(caught.value).startswith(f"{tmp_path}/{name}")
    assert problem in str(caught.value)


def test_answers_without_an_output_file_go_to_the_terminal(
    chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": null, "messages": [{"role": "user", "content": "one"}]}')
    _run(model=chat_model, prompts=str(tmp_path / "a.jsonl"))
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["answer"] == _expected(chat_model, "[user]one[assistant]")
    print("the terminal is still open")


def test_an_answer_that_ends_with_its_last_token_has_ended(model: str, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one")
    settings = Path(model) / "generation_config.json"
    before = settings.read_text()
    first = _greedy(model, "one")[:1]
    settings.write_text(json.dumps(json.loads(before) | {"eos_token_id": first}))
    output = tmp_path / "answers.jsonl"
    generate.run(GenerateOptions(model=model, prompts=str(tmp_path / "b.txt"), output=str(output), max_new_tokens=1))
    settings.write_text(before)
    assert json.loads(output.read_text())["ended"] is True


def test_a_prompt_that_leaves_no_room_is_refused(model: str) -> None:
    with pytest.raises(
        InputError, match=r"^--prompt: the model has positions for 0 more tokens, expected 6 \(--max_new_tokens\)$"
    ):
        _run(model=model, prompt="x" * 5000)


def test_an_answer_is_as_long_as_the_positions_allow(model: str, tmp_path: Path) -> None:
    positions = json.loads((Path(model) / "config.json").read_text())["max_position_embeddings"]
    (tmp_path / "b.txt").write_text("x" * (positions - 3))
    output = tmp_path / "answers.jsonl"
    generate.run(GenerateOptions(model=model, prompts=str(tmp_path / "b.txt"), output=str(output)))
    assert json.loads(output.read_text())["ended"] is False
    with pytest.raises(InputError, match=r"positions for 3 more tokens, expected 6 \(--max_new_tokens\)$"):
        _run(model=model, prompts=str(tmp_path / "b.txt"))


def test_a_row_without_a_prompt_is_refused_by_name(model: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(InputError, match=r"line 2: expected the field 'prompt' \(--prompt_column\), got .*'question'"):
        _run(model=model, prompts=str(tmp_path / "rows.jsonl"))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--model: the folder .* is no model: it has no config\.json"):
        _run(model=str(tmp_path), prompt="a")


def test_prompts_are_read_in_the_form_that_the_template_takes(chat_model: str, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    _run(model=chat_model, prompts=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "answers.jsonl"))
    answer = json.loads((tmp_path / "answers.jsonl").read_text())
    assert answer["answer"] == _expected(chat_model, "[user]one[assistant]")


def test_a_special_token_that_a_prompt_spells_is_text(chat_model: str) -> None:
    answerer = generate._Answerer(GenerateOptions(model=chat_model), chat_model)
    end = TOKENIZER.eos_token
    read = answerer.encode(f"a{end}b")["input_ids"][0].tolist()
    assert TOKENIZER.eos_token_id not in read
    assert TOKENIZER.decode(read) == f"[user]a{end}b[assistant]"


def test_no_prompt_is_answered_if_one_of_them_leaves_no_room(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "x" * 5000}))
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: the model has positions for 0 more tokens"):
        _run(model=model, prompts=str(tmp_path / "a.jsonl"), output=str(tmp_path / "answers.jsonl"))
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_cut_answer_is_said(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    _run(model=model, prompt="ask 1: ")
    said = "the answer was cut at --max_new_tokens" in capsys.readouterr().err
    assert said == (TOKENIZER.eos_token_id not in _greedy(model, "ask 1: "))


def test_an_existing_output_is_not_overwritten(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(InputError, match=r"^--output: expected a file that does not exist, got "):
        _run(model=model, prompts=str(tmp_path / "a.txt"), output=str(tmp_path / "a.txt"))


def test_a_folder_without_weights_is_one_line(model: str, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(model) / name).read_bytes())
    with pytest.raises(InputError, match=r"^--model: no weights from "):
        _run(model=str(tmp_path), prompt="a")


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "[user]a[assistant]"),
        ({"conversations": [{"from": "human", "value": "a"}], "system": "s"}, "[system]s[user]a[assistant]"),
        ({"instruction": "a", "input": "b", "output": "c"}, "[user]a\n\nb[assistant]"),
    ],
)
def test_rows_of_training_are_answered_without_their_answers(
    chat_model: str, tmp_path: Path, row: dict[str, Any], read: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    _run(model=chat_model, prompts=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "answers.jsonl"))
    assert json.loads((tmp_path / "answers.jsonl").read_text())["answer"] == _expected(chat_model, read)


def test_a_row_whose_tools_the_template_does_not_show_is_refused(chat_model: str, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "b"}], "tools": [{"name": "f"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="line 1: the chat template leaves out the tools"):
        _run(model=chat_model, prompts=str(tmp_path / "rows.jsonl"))


def test_variables_reach_the_template(chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = json.loads((Path(chat_model) / "tokenizer_config.json").read_text()).get("chat_template")
    template = template or (Path(chat_model) / "chat_template.jinja").read_text()
    (tmp_path / "template.jinja").write_text(template + "{{ mood }}")
    options = {"chat_template": str(tmp_path / "template.jinja"), "chat_template_kwargs": {"mood": "glad"}}
    _run(model=chat_model, prompt="hello", **options)
    assert capsys.readouterr().out.strip() == _expected(chat_model, "[user]hello[assistant]glad").strip()


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--model: expected an existing folder"):
        _run(model=str(tmp_path / "no-model"), prompt="hello")
