from pathlib import Path

import pytest

from selfgen_ds.config import InputError
from selfgen_ds.data.rows import read_rows
from selfgen_ds.data.tasks import Row, generate

GOOD = b'{"prompt": "1+1=", "completion": "2"}'


def _read(tmp_path: Path, content: bytes, prompt: str = "prompt", completion: str = "completion") -> list[Row]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return list(read_rows(str(path), "train", prompt, completion))


def _error(tmp_path: Path, bad_line: bytes) -> str:
    """The message for a file whose third line is the bad one."""
    with pytest.raises(InputError) as caught:
        _read(tmp_path, GOOD + b"\n\n" + bad_line + b"\n" + GOOD + b"\n")
    return str(caught.value)


BAD_LINES = {
    "no completion": (b'{"prompt": "a"}', "field 'completion' is missing"),
    "no prompt": (b'{"completion": "b"}', "field 'prompt' is missing"),
    "empty object": (b"{}", "field 'prompt' is missing"),
    "number": (b'{"prompt": "a", "completion": 7}', "field 'completion': expected a string, got int"),
    "null": (b'{"prompt": null, "completion": "b"}', "field 'prompt': expected a string, got NoneType"),
    "empty prompt": (b'{"prompt": "", "completion": "b"}', "field 'prompt': expected text, got an empty string"),
    "empty completion": (b'{"prompt": "a", "completion": ""}', "field 'completion': expected text"),
    "half a surrogate pair": (rb'{"prompt": "\ud800", "completion": "b"}', "field 'prompt'"),
    "cut off": (b'{"prompt": "a", "completion": "b"', "malformed JSON"),
    "two objects": (b'{"prompt": "a", "completion": "b"} {}', "malformed JSON"),
    "no JSON": (b"not json", "malformed JSON"),
    "list": (b'["a", "b"]', "expected one JSON object, got list"),
    "string": (b'"a"', "expected one JSON object, got str"),
    "Latin-1": (b'{"prompt": "\xff", "completion": "b"}', "expected UTF-8"),
    "surrogate in UTF-8": (b'{"prompt": "\xed\xa0\x80", "completion": "b"}', "UTF-8"),
}


@pytest.mark.parametrize(("line", "expected"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_an_error_that_names_file_line_and_field(tmp_path: Path, line: bytes, expected: str) -> None:
    message = _error(tmp_path, line)
    assert f"{tmp_path / 'rows.jsonl'}, line 3" in message
    assert expected in message


def test_a_missing_field_is_told_with_the_fields_there_are(tmp_path: Path) -> None:
    assert "'question', 'answer'" in _error(tmp_path, b'{"question": "a", "answer": "b"}')


def test_rows_before_a_bad_line_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n{\n")
    assert next(read_rows(str(path), "train", "prompt", "completion")) == Row(prompt="1+1=", completion="2")


def test_rows_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines = [f'{{"prompt": "p{i}", "completion": "c{i}"}}\n'.encode() for i in range(50)]
    assert _read(tmp_path, b"".join(lines)) == [Row(prompt=f"p{i}", completion=f"c{i}") for i in range(50)]


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    assert len(_read(tmp_path, b"\n" + GOOD + b"\n  \n\r\n" + GOOD + b"\n\n")) == 2


def test_the_last_line_needs_no_newline(tmp_path: Path) -> None:
    assert len(_read(tmp_path, GOOD + b"\n" + GOOD)) == 2


def test_columns_are_found_by_the_names_given(tmp_path: Path) -> None:
    content = b'{"prompt": "no", "completion": "no", "question": "q", "answer": "a"}'
    assert _read(tmp_path, content, "question", "answer") == [Row(prompt="q", completion="a")]


def test_other_fields_may_hold_anything(tmp_path: Path) -> None:
    content = b'{"prompt": "p", "completion": "c", "id": 3, "tags": [null]}'
    assert _read(tmp_path, content) == [Row(prompt="p", completion="c")]


def test_text_is_kept_to_the_character(tmp_path: Path) -> None:
    content = '{"prompt": " né\\n", "completion": "\\ud83d\\ude00\\t 😀 "}'.encode()
    assert _read(tmp_path, content) == [Row(prompt=" né\n", completion="😀\t 😀 ")]


def test_a_built_in_task_is_read_by_its_name() -> None:
    rows = list(read_rows("builtin:running_sum", "test", "prompt", "completion"))
    assert rows == list(generate("running_sum", "test"))


def test_an_unknown_built_in_task_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"builtin:sums: unknown task; known are pointer_chase, running_sum"):
        next(read_rows("builtin:sums", "train", "prompt", "completion"))
