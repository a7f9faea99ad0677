import pytest
from tokenizers.processors import TemplateProcessing

from selfgen_ds.config import InputError
from selfgen_ds.data.samples import Samples, tokenize
from selfgen_ds.data.tasks import Row
from selfgen_ds.data.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def _ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def _tokenize(
    *rows: tuple[str, str], max_length: int = 100, max_truncated_share: float = 1.0, max_refused_share: float = 0.0
) -> Samples:
    texts = [Row(prompt=prompt, completion=completion) for prompt, completion in rows]
    return tokenize(texts, TOKENIZER, "rows.jsonl", max_length, max_truncated_share, max_refused_share)


def test_a_response_is_the_completion_and_the_end_token() -> None:
    row = _tokenize(("ask ", "tell")).rows[0]
    assert (row["prompt_ids"], row["response_ids"]) == (_ids("ask "), [*_ids("tell"), END])


def test_text_that_spells_a_special_token_stays_text() -> None:
    row = _tokenize(("a </s>", "<pad></s>")).rows[0]
    assert TOKENIZER.decode(row["prompt_ids"], skip_special_tokens=True) == "a </s>"
    assert TOKENIZER.decode(row["response_ids"], skip_special_tokens=True) == "<pad></s>"


def test_a_row_that_just_fits_is_not_truncated() -> None:
    samples = _tokenize(("abc", "defg"), max_length=8)
    assert (samples.truncated, samples.rows[0]["response_ids"]) == (0, [*_ids("defg"), END])


def test_a_row_without_room_for_the_end_token_is_truncated() -> None:
    samples = _tokenize(("abc", "defg"), max_length=7)
    assert (samples.truncated, samples.rows[0]["response_ids"]) == (1, _ids("defg"))


def test_a_response_is_cut_exactly_at_the_longest_length() -> None:
    row = _tokenize(("abc", "defghijk"), max_length=5).rows[0]
    assert (row["prompt_ids"], row["response_ids"]) == (_ids("abc"), _ids("de"))


def test_truncated_rows_are_counted() -> None:
    samples = _tokenize(("a", "long enough"), ("a", "b"), ("a", "longer than that"), max_length=5)
    assert (samples.truncated, samples.refused, len(samples)) == (2, 0, 3)


def test_a_prompt_that_leaves_room_for_one_token_is_used() -> None:
    samples = _tokenize(("abcd", "ef"), max_length=5)
    assert (samples.refused, samples.rows[0]["response_ids"]) == (0, _ids("e"))


def test_prompts_without_room_are_counted_as_refused() -> None:
    samples = _tokenize(("abcde", "f"), ("a", "b"), ("abcdefg", "h"), max_length=5, max_refused_share=0.7)
    assert (samples.refused, samples.truncated, len(samples)) == (2, 0, 1)


def test_too_many_refused_prompts_are_an_error_that_names_source_row_and_setting() -> None:
    with pytest.raises(InputError) as caught:
        _tokenize(("a", "b"), ("a", "b"), ("abcde", "f"), ("abcdefg", "h"), max_length=5, max_refused_share=0.4)
    message = str(caught.value)
    assert message.startswith("rows.jsonl: 2 of 4 prompts")
    assert "the first is row 3" in message
    assert "data.max_length=5" in message
    assert "data.max_refused_share=0.4" in message


def test_the_allowed_share_of_refused_prompts_is_no_error() -> None:
    assert _tokenize(("abcde", "f"), ("a", "b"), max_length=5, max_refused_share=0.5).refused == 1


def test_too_many_truncated_responses_are_an_error_that_names_source_and_setting() -> None:
    with pytest.raises(InputError) as caught:
        _tokenize(("a", "bcdefg"), ("a", "b"), ("a", "b"), max_length=5, max_truncated_share=0.3)
    message = str(caught.value)
    assert message.startswith("rows.jsonl: 1 of 3 responses are cut at data.max_length=5")
    assert "data.max_truncated_share=0.3" in message


def test_the_allowed_share_of_truncated_responses_is_no_error() -> None:
    assert _tokenize(("a", "bcdefg"), ("a", "b"), max_length=5, max_truncated_share=0.5).truncated == 1


def test_no_row_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl: no usable row among 0"):
        _tokenize()


def test_no_usable_row_is_an_error() -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl: no usable row among 1"):
        _tokenize(("abcde", "f"), max_length=5, max_refused_share=1.0)


def test_a_sample_id_is_the_rows_number_in_the_source() -> None:
    samples = _tokenize(("abcde", "f"), ("a", "b"), ("abcde", "f"), ("a", "c"), max_length=5, max_refused_share=0.5)
    assert samples.rows["sample_id"][:] == [1, 3]


def test_sample_ids_go_on_past_a_thousand_rows() -> None:
    rows = [("a", str(number)) for number in range(2500)]
    samples = _tokenize(*rows)
    assert samples.rows["sample_id"][:] == list(range(2500))
    assert samples.rows[2345]["response_ids"] == [*_ids("2345"), END]


def test_the_row_that_a_refusal_names_is_counted_past_a_thousand_rows() -> None:
    with pytest.raises(InputError, match=r"the first is row 1500\)"):
        _tokenize(*[("a", "b")] * 1499, ("abcde", "f"), max_length=5)


def test_a_forced_error_and_the_rest_are_tokenised() -> None:
    row = Row(prompt="p", completion="abcd", forced="ax", rest="cd")
    sample = tokenize([row], TOKENIZER, "builtin:x", 100).rows[0]
    assert (sample["forced_ids"], sample["rest_ids"]) == (_ids("ax"), [*_ids("cd"), END])


def test_rows_of_a_file_have_no_forced_error() -> None:
    sample = _tokenize(("a", "b")).rows[0]
    assert (sample["forced_ids"], sample["rest_ids"]) == (None, None)


def test_only_the_prompt_gets_what_a_tokenizer_puts_around_a_text_and_never_its_end_token() -> None:
    framing = byte_tokenizer()
    framing.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A </s>",
        special_tokens=[("<pad>", framing.pad_token_id), ("</s>", framing.eos_token_id)],
    )
    sample = tokenize([Row(prompt="ask", completion="tell")], framing, "rows.jsonl", 100).rows[0]
    assert sample["prompt_ids"] == [framing.pad_token_id, *_ids("ask")]
    assert sample["response_ids"] == [*_ids("tell"), END]
