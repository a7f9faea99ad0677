"""The files of `selfgen.generate_command`: what prompts say, and which answers are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.methods.method import Question
from selfgen_ds.model.policy import Sampling
from selfgen_ds.rounds.answer_files import AnswerFiles, write_answers

END = byte_tokenizer().eos_token_id


def _ids(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


def _files(**changes: Any) -> AnswerFiles:
    parts: dict[str, Any] = {
        "tokenizer": byte_tokenizer(),
        "sampling": Sampling(temperature=0.7, top_p=0.9, top_k=5),
        "end_tokens": [END],
        "closing_id": END,
        "vocabulary": 258,
        "positions": None,
        "seed": 3,
    }
    return AnswerFiles(**parts | changes)


def _question(sample_id: int, draw: int = 0, prompt: str = "hello") -> Question:
    return Question(sample_id=sample_id, draw=draw, prompt_ids=_ids(prompt))


def _prompts(path: Path, files: AnswerFiles, questions: list[Question], number: int = 0) -> list[dict[str, Any]]:
    files.write_prompts([path], questions, 4, number)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_prompt_says_all_that_an_engine_has_to_know(tmp_path: Path) -> None:
    (prompt,) = _prompts(tmp_path / "prompts", _files(), [_question(7, 1)])
    assert isinstance(prompt.pop("seed"), int)
    assert prompt == {
        "id": "7-1",
        "prompt_token_ids": _ids("hello"),
        "prompt": "hello",
        "max_new_tokens": 4,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "stop_token_ids": [END],
    }


def test_an_answer_may_not_be_longer_than_the_models_positions(tmp_path: Path) -> None:
    prompts = _prompts(tmp_path / "prompts", _files(positions=8), [_question(0, prompt="abc"), _question(1)])
    assert [prompt["max_new_tokens"] for prompt in prompts] == [4, 3]


def test_seeds_differ_between_answers_samples_and_rounds_and_stay_the_same(tmp_path: Path) -> None:
    questions = [_question(0), _question(0, 1), _question(1)]
    seeds = [[p["seed"] for p in _prompts(tmp_path / "p", _files(), questions, number)] for number in (0, 1, 0)]
    assert seeds[0] == seeds[2]
    assert len({*seeds[0], *seeds[1]}) == 6


def test_prompts_are_dealt_out_in_turn(tmp_path: Path) -> None:
    paths = [tmp_path / "first", tmp_path / "second"]
    _files().write_prompts(paths, [_question(i) for i in range(5)], 4, 0)
    ids = [[json.loads(line)["id"] for line in path.read_text().splitlines()] for path in paths]
    assert ids == [["0-0", "2-0", "4-0"], ["1-0", "3-0"]]


def _read(path: Path, lines: list[Any], **changes: Any) -> tuple[dict[str, list[int]], list[str]]:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    answers, problems = _files(**changes).read_answers([path], {"0-0": 4, "1-0": 4})
    return {name: ids.tolist() for name, ids in answers.items()}, problems


GOOD = {"id": "0-0", "token_ids": [104, END]}
BAD: dict[str, tuple[Any, str]] = {
    "a line that was cut": ('{"id": "1-0", "tok', 'expected a JSON object, got b\'{"id": "1-0", "tok\\n\''),
    "no object": ([1], "field 'id': expected the id of a prompt, got None"),
    "no answer": ({"id": "1-0"}, "expected the field 'token_ids', or a text in 'text' and true or false in 'ended'"),
    "a text without its end": (
        {"id": "1-0", "text": "hi"},
        "expected the field 'token_ids', or a text in 'text' and true or false in 'ended'",
    ),
    "no list": ({"id": "1-0", "token_ids": "hi"}, "field 'token_ids': expected a list of integers"),
    "a truth value": ({"id": "1-0", "token_ids": [True, END]}, "field 'token_ids': expected a list of integers"),
    "another vocabulary": (
        {"id": "1-0", "token_ids": [258, END]},
        "field 'token_ids': expected ids from 0 to 257, got 258",
    ),
    "a number below zero": (
        {"id": "1-0", "token_ids": [-1, END]},
        "field 'token_ids': expected ids from 0 to 257, got -1",
    ),
    "a huge number": ({"id": "1-0", "token_ids": [1 << 80, END]}, "Python int too large to convert to C long"),
    "too many tokens": (
        {"id": "1-0", "token_ids": [104] * 5},
        "expected at most 4 tokens (max_new_tokens), got 5",
    ),
    "tokens after the end": (
        {"id": "1-0", "token_ids": [END, 104]},
        f"expected the end token {END} at the end alone, got tokens after it",
    ),
    "no end": (
        {"id": "1-0", "token_ids": [104]},
        f"expected an end token ({END}) or 4 tokens (max_new_tokens), got 1 tokens without an end token",
    ),
    "nothing": (
        {"id": "1-0", "token_ids": []},
        f"expected an end token ({END}) or 4 tokens (max_new_tokens), got 0 tokens without an end token",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_an_answer_that_the_model_could_not_give_is_named_with_its_line(tmp_path: Path, case: str) -> None:
    line, expected = BAD[case]
    path = tmp_path / "answers"
    answers, problems = _read(path, [GOOD, line])
    assert answers == {"0-0": [104, END]}
    assert problems == [f"{path}, line 2: {expected}"]


def test_an_answer_that_is_given_twice_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    answers, problems = _read(path, [GOOD, GOOD])
    assert answers == {}
    assert problems == [f"{path}, line 2: field 'id': '0-0' is answered twice, first at {path}, line 1"]


TEXTS = {
    "ended": ({"text": "hi", "ended": True}, [*_ids("hi"), END]),
    "cut by the limit": ({"text": "hiya", "ended": False}, _ids("hiya")),
    "empty": ({"text": "", "ended": True}, [END]),
    "longer than the limit when it is tokenized again": ({"text": "hi there", "ended": True}, _ids("hi t")),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_becomes_tokens_with_the_end_token_if_the_engine_has_met_it(tmp_path: Path, case: str) -> None:
    row, expected = TEXTS[case]
    assert _read(tmp_path / "answers", [{"id": "1-0"} | row]) == ({"1-0": expected}, [])


def test_written_answers_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    path.write_text(json.dumps(GOOD) + "\n")
    answers, _ = _files().read_answers([path], {"0-0": 4})
    write_answers(tmp_path / "kept", answers)
    again, problems = _files().read_answers([tmp_path / "kept", tmp_path / "missing"], {"0-0": 4})
    assert not problems
    assert {name: ids.tolist() for name, ids in again.items()} == {"0-0": [104, END]}
