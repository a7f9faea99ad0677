import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.methods.reject import first_rejected, load_reject
from tests.chat_tokenizers import tokenizer
from tests.tiers import sweep

BYTES = byte_tokenizer()
NO_FUNCTION = 3


def capitals(text: str) -> list[tuple[int, int]]:
    """A user's function: it rejects capitals."""
    return [(i, i + 1) for i, character in enumerate(text) if character.isupper()]


def _first(text: str, candidates: list[int], patterns: list[str]) -> int | None:
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    return first_rejected(ids, candidates, load_reject(patterns), BYTES)


@pytest.mark.parametrize(
    ("candidates", "expected"), [([0, 1, 2, 3, 4, 5], 2), ([3, 5], 3), ([4], 4), ([0, 1, 5], None), ([], None)]
)
def test_the_first_candidate_within_a_span_is_found(candidates: list[int], expected: int | None) -> None:
    assert _first("a bad", candidates, ["bad"]) == expected


def test_several_expressions_reject_independently() -> None:
    assert _first("one two", list(range(7)), ["two", "ne"]) == 1
    assert _first("one two", list(range(7)), ["six", "two"]) == 4


def test_an_expression_that_matches_nothing_rejects_nothing() -> None:
    assert _first("abc", [0, 1, 2], ["x*", "$", "^", "(?=b)"]) is None


@pytest.mark.parametrize("text", ["xéy", "x😀y", "x日本y", "xe\u0301y"])
def test_every_byte_of_a_character_is_part_of_it(text: str) -> None:
    last = len(text.encode()) - 1
    inner = text[1:-1]
    assert [_first(text, [i], [inner]) for i in range(last + 1)] == [None, *range(1, last), None]
    assert [_first(text, [i], ["y"]) for i in range(last + 1)] == [None] * last + [last]
    assert [_first(text, [i], ["^x"]) for i in range(last + 1)] == [0] + [None] * last


@given(
    text=st.text("ab c", max_size=20),
    candidates=st.sets(st.integers(0, 19)),
    patterns=st.lists(st.sampled_from(["a", "ab", "b+", " .*", "c|a", "(?=a)"]), min_size=1, max_size=3),
)
def test_what_is_found_is_the_first_candidate_of_all_matches(
    text: str, candidates: set[int], patterns: list[str]
) -> None:
    some = sorted(candidate for candidate in candidates if candidate < len(text))
    rejected = {i for pattern in patterns for match in re.finditer(pattern, text) for i in range(*match.span())}
    assert _first(text, some, patterns) == min(rejected & set(some), default=None)


def test_what_a_draw_makes_of_a_character_is_rejected_where_it_breaks_it() -> None:
    first = BYTES("é")["input_ids"][0]
    ids = [first, *BYTES("a b")["input_ids"]]
    assert BYTES.decode(ids) == "\ufffda b"
    assert [first_rejected(ids, [i], load_reject(["\ufffd"]), BYTES) for i in range(4)] == [0, 1, None, None]
    assert [_first("x\ufffdy", [i], ["\ufffd"]) for i in range(4)] == [None, 1, 2, 3]


PIECES = st.sampled_from(["a", "the ", " answer", "é", "😀", "日", "</s>", "<|im_end|>", "\n", ".", " "])


@sweep("family", ["chatml", "llama2", "zephyr", "gemma"], check=2)
@given(before=st.lists(PIECES, max_size=4), behind=st.lists(PIECES, max_size=4))
def test_of_any_tokenizer_what_is_found_begins_where_the_match_begins(
    family: str, before: list[str], behind: list[str]
) -> None:
    chat_tokenizer = tokenizer(family)
    ids = chat_tokenizer("".join(before) + "QQ" + "".join(behind), add_special_tokens=False)["input_ids"]
    text = chat_tokenizer.decode(ids)
    match = re.search("QQ", text)
    assert match
    found = first_rejected(ids, list(range(len(ids))), load_reject(["QQ"]), chat_tokenizer)
    assert found is not None
    assert "Q" not in chat_tokenizer.decode(ids[:found])
    assert "Q" in chat_tokenizer.decode(ids[: found + 1])


def test_a_function_is_named_by_its_import_path() -> None:
    spans = load_reject("tests.unit.test_reject:capitals")
    ids = BYTES("abCd")["input_ids"]
    assert [first_rejected(ids, [i], spans, BYTES) for i in range(4)] == [None, None, 2, None]


def test_nothing_is_rejected_by_default() -> None:
    assert list(load_reject(None)("anything")) == []


@pytest.mark.parametrize(
    "given", ["nowhere:f", "re:nothing", "re", "", ":", "./reject.py:f", "tests.unit.test_reject:NO_FUNCTION", ["a("]]
)
def test_a_setting_of_neither_expressions_nor_a_function_is_one_clear_line(given: str | list[str]) -> None:
    with pytest.raises(InputError, match=r"^selfgen\.reject: ") as caught:
        load_reject(given)
    assert "\n" not in str(caught.value)
    assert (given if isinstance(given, str) else given[0]) in str(caught.value)


@pytest.mark.parametrize("spans", [lambda text: list(re.finditer("a", text)), lambda text: [1], lambda text: 1 / 0])
def test_a_function_that_fails_on_an_answer_is_named_with_it(spans: Any) -> None:
    with pytest.raises(RuntimeError, match=r"^selfgen\.reject: no spans \(start, end\) of 'banana': "):
        first_rejected(BYTES("banana")["input_ids"], [0], spans, BYTES)
