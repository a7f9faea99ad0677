import json
import multiprocessing
import os
from collections.abc import Iterator
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.config import DataConfig, Recipe, Source
from selfgen_ds.data import encoding
from selfgen_ds.data import samples as samples_module
from selfgen_ds.data.encoding import chunks
from selfgen_ds.data.row_checks import Columns, Row, TextPair
from selfgen_ds.data.rows import Opened, open_source
from selfgen_ds.data.samples import (
    Format,
    Samples,
    end_tokens,
    first_rows,
    load,
    load_samples,
    with_consecutive_ids,
)
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.validation.inputs import check_shares
from tests.chat_tokenizers import CHATML, CHATML_GENERATION, build, tokenizer
from tests.problems import found_by

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "selfgen_ds"


def _ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def _opened(rows: list[TextPair] | list[Conversation], name: str = "rows.jsonl") -> Opened:
    return Opened(name=name, fingerprint=[name, repr(rows)], rows=rows)


def _tokenize(*rows: tuple[str, str], max_length: int = 100) -> Samples:
    texts = [TextPair(prompt=prompt, completion=completion) for prompt, completion in rows]
    return load_samples(_opened(texts), TOKENIZER, Format(max_length=max_length))


def _only(samples: Samples) -> tuple[list[int], list[int]]:
    """Return prompt and response of the one sample."""
    (sample,) = first_rows([samples])
    return sample.prompt_ids.tolist(), sample.response_ids.tolist()


def _turns(samples: Samples, index: int = 0) -> list[list[int]]:
    """Return start, end of the replaceable part and end of each response, as the table stores them."""
    turns: list[list[int]] = samples.table[index]["turns"].reshape(-1, 3).tolist()
    return turns


def _chat(*contents: str, **others: Any) -> Conversation:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return Conversation(messages=messages, **others)


# --- pairs ---


def test_a_response_is_the_completion_and_the_end_token() -> None:
    assert _only(_tokenize(("ask ", "tell"))) == (_ids("ask "), [*_ids("tell"), END])


def test_all_of_a_response_but_the_end_token_is_replaceable() -> None:
    assert _turns(_tokenize(("ask", "tell"))) == [[3, 7, 8]]


def test_text_that_spells_a_special_token_stays_text() -> None:
    prompt, response = _only(_tokenize(("a </s>", "<pad></s>")))
    assert TOKENIZER.decode(prompt, skip_special_tokens=True) == "a </s>"
    assert TOKENIZER.decode(response, skip_special_tokens=True) == "<pad></s>"


def test_only_the_prompt_gets_what_a_tokenizer_puts_around_a_text_and_never_its_end_token() -> None:
    framing = byte_tokenizer()
    framing.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A </s>",
        special_tokens=[("<pad>", framing.pad_token_id), ("</s>", framing.eos_token_id)],
    )
    samples = load_samples(_opened([TextPair(prompt="ask", completion="tell")]), framing, Format(max_length=100))
    assert _only(samples) == ([framing.pad_token_id, *_ids("ask")], [*_ids("tell"), END])


def test_a_row_that_just_fits_is_not_truncated() -> None:
    samples = _tokenize(("abc", "defg"), max_length=8)
    assert (samples.truncated, _only(samples)[1]) == (0, [*_ids("defg"), END])


def test_a_row_without_room_for_the_end_token_is_truncated() -> None:
    samples = _tokenize(("abc", "defg"), max_length=7)
    assert (samples.truncated, _only(samples)[1]) == (1, _ids("defg"))


def test_a_response_is_cut_exactly_at_the_longest_length() -> None:
    samples = _tokenize(("abc", "defghijk"), max_length=5)
    assert _only(samples) == (_ids("abc"), _ids("de"))
    assert _turns(samples) == [[3, 4, 5]]  # nothing reads the last token


def test_truncated_rows_are_counted() -> None:
    samples = _tokenize(("a", "long enough"), ("a", "b"), ("a", "longer than that"), max_length=5)
    assert (samples.truncated, samples.refused, len(samples)) == (2, 0, 3)


def test_a_prompt_that_leaves_room_for_one_token_is_used() -> None:
    samples = _tokenize(("abcd", "ef"), max_length=5)
    assert (samples.refused, _only(samples)[1]) == (0, _ids("e"))


def test_prompts_without_room_are_counted_as_refused() -> None:
    samples = _tokenize(("abcde", "f"), ("a", "b"), ("abcdefg", "h"), max_length=5)
    assert (samples.refused, samples.truncated, len(samples)) == (2, 0, 1)


def test_every_row_read_is_used_or_refused_and_the_truncated_are_used() -> None:
    rows = [("x" * prompt, "y" * completion) for prompt in range(1, 9) for completion in range(1, 9)]
    samples = _tokenize(*rows, max_length=7)
    assert samples.read == 64 == len(samples) + samples.refused
    assert samples.refused == 16
    assert samples.truncated == sum(p + c + 1 > 7 for p in range(1, 7) for c in range(1, 9))
    cut = sum(int(samples[i].target_ids[-1] != END) for i in range(len(samples)))
    assert samples.truncated == cut


def test_no_row_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl: no usable row among 0"):
        _tokenize()


def test_no_usable_row_is_an_error_that_names_the_first() -> None:
    expected = r"rows\.jsonl: no usable row among 1: row 1: the prompt leaves no room for a response within 5 tok"
    with pytest.raises(InputError, match=expected):
        _tokenize(("abcde", "f"), max_length=5)


def test_a_sample_id_is_the_rows_number_in_the_source() -> None:
    samples = _tokenize(("abcde", "f"), ("a", "b"), ("abcde", "f"), ("a", "c"), max_length=5)
    assert [samples[i].sample_id for i in range(2)] == [1, 3]


def test_sample_ids_continue_past_a_thousand_rows() -> None:
    samples = _tokenize(*(("a", str(number)) for number in range(2500)))
    assert samples.table["sample_id"][:].tolist() == list(range(2500))
    assert samples[2345].response_ids.tolist() == [*_ids("2345"), END]
    assert samples.read == 2500


def test_a_sample_has_its_documented_types() -> None:
    samples = _tokenize(("a", "b"), ("c", "de"))
    sample = samples[1]
    assert type(sample.sample_id) is int
    assert (sample.target_ids.dtype, sample.target_ids.shape) == (np.int64, (4,))
    for mask in (sample.loss_mask, sample.replaceable_mask, sample.replaced_mask):
        assert (mask.dtype, mask.shape) == (bool, (4,))
    lengths = samples.lengths(np.array([1, 0, 1]))
    assert (lengths.dtype, lengths.tolist()) == (np.int64, [4, 3, 4])


def test_a_limit_is_of_rows_read_the_first_ones() -> None:
    rows = [TextPair(prompt="a", completion=str(number)) for number in range(5)]
    samples = load_samples(_opened(rows), TOKENIZER, Format(max_length=9, limit=2))
    assert (samples.read, len(samples)) == (2, 2)
    assert samples[1].response_ids.tolist() == [*_ids("1"), END]


def test_what_follows_the_limit_is_not_read() -> None:
    def rows() -> Iterator[TextPair]:
        yield TextPair(prompt="a", completion="b")
        raise AssertionError

    assert (
        len(load_samples(Opened(name="x", fingerprint=[], rows=rows()), TOKENIZER, Format(max_length=9, limit=1))) == 1
    )


def _sizes(rows: list[Any]) -> list[int]:
    cut = list(chunks(iter(rows)))
    assert [id(row) for chunk in cut for row in chunk] == [id(row) for row in rows]
    return [len(chunk) for chunk in cut]


def test_rows_are_tokenized_in_chunks_of_bounded_rows_and_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK_CHARACTERS", 3000)
    third = "x" * 1001
    assert _sizes([]) == []
    assert _sizes([TextPair(prompt="a", completion="b")] * 2500) == [1000, 1000, 500]
    assert _sizes([TextPair(prompt=third, completion="b")] * 6) == [3, 3]
    assert _sizes([TextPair(prompt="a", completion=third)] * 7) == [3, 3, 1]
    assert _sizes([_chat("a", third)] * 7) == [3, 3, 1]
    assert _sizes([TextPair(prompt=third * 9, completion="b")] * 2) == [1, 1]
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    assert _sizes([Conversation(messages=[{"role": "user", "content": third}, call])] * 4) == [3, 1]


def test_chunks_that_text_ends_are_numbered_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK_CHARACTERS", 100)
    rows = [TextPair(prompt="a" * (100 if i % 3 else 1), completion=str(i)) for i in range(7)]
    samples = load_samples(_opened(rows), TOKENIZER, Format(max_length=9))
    assert samples.table["sample_id"][:].tolist() == [0, 3, 6]
    assert (samples.read, samples.refused, len(samples.too_long)) == (7, 4, 4)
    assert [reason.split(":")[0] for reason in samples.reasons] == ["row 2", "row 3", "row 5", "row 6"]


# --- conversations ---


def test_a_conversation_is_cut_in_a_later_turn() -> None:
    chat = _chat("a", "b", "c", "defghi")
    whole = load_samples(_opened([chat]), tokenizer("chatml"), Format(max_length=1000))
    (first, second) = _turns(whole)
    longest = second[0] + 2
    cut = load_samples(_opened([chat]), tokenizer("chatml"), Format(max_length=longest))
    assert (cut.truncated, cut.refused) == (1, 0)
    assert cut[0].target_ids.tolist() == whole[0].target_ids[:longest].tolist()
    assert _turns(cut) == [first, [second[0], longest - 1, longest]]


def test_a_conversation_cut_before_a_later_turn_keeps_the_first() -> None:
    chat = _chat("a", "b", "c" * 20, "d")
    whole = load_samples(_opened([chat]), tokenizer("chatml"), Format(max_length=1000))
    cut = load_samples(_opened([chat]), tokenizer("chatml"), Format(max_length=_turns(whole)[1][0]))
    assert (cut.truncated, cut.refused, _turns(cut)) == (1, 0, _turns(whole)[:1])


def test_a_conversation_without_a_turn_left_is_refused_by_its_line() -> None:
    chats = [_chat("a", "b"), _chat("c" * 50, "d", where="rows.jsonl, line 9")]
    samples = load_samples(_opened(chats), tokenizer("chatml"), Format(max_length=40))
    assert (samples.read, samples.refused, samples.truncated, len(samples)) == (2, 1, 0, 1)
    assert samples.reasons == [
        "rows.jsonl, line 9: the prompt leaves no room for a response within 40 tokens; it has 58 itself"
    ]


def test_what_a_template_writes_behind_the_last_turn_is_no_truncation() -> None:
    chat = _chat("a", "b")
    whole = load_samples(_opened([chat]), tokenizer("chatml"), Format(max_length=1000))
    [[start, _, end]] = _turns(whole)
    assert end < len(whole[0])
    cut = load_samples(_opened([chat]), tokenizer("chatml"), Format(max_length=end))
    assert cut.truncated == 0
    assert _turns(cut) == [[start, end - 1, end]]


@pytest.mark.parametrize("assistant_turns", ["all", "last"])
def test_the_turns_that_are_learned_are_all_or_the_last(assistant_turns: str) -> None:
    chat = _chat("a", "bcd", "e", "fgh")
    form = Format(max_length=1000, assistant_turns=assistant_turns)
    samples = load_samples(_opened([chat]), tokenizer("chatml"), form)
    sample = samples[0]
    learned = [tokenizer("chatml").decode(sample.target_ids[start:end]) for start, _, end in _turns(samples)]
    assert learned == ["bcd<|im_end|>", "fgh<|im_end|>"][-1 if assistant_turns == "last" else 0 :]
    assert tokenizer("chatml").decode(sample.response_ids) == "fgh<|im_end|>"
    assert tokenizer("chatml").decode(sample.prompt_ids).endswith("e<|im_end|>\n<|im_start|>assistant\n")


MARKERS = """
{%- for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}
{{- m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}
{%- endfor %}"""


def test_a_first_token_gets_no_loss() -> None:
    bare = build(MARKERS, "byte_level", ("<|im_end|>",), None, "<|im_end|>")
    samples = load_samples(_opened([_chat("", "b"), _chat("a", "b")]), bare, Format(max_length=99))
    assert (samples.refused, samples[0].sample_id) == (1, 1)


def test_a_closing_token_is_what_stands_behind_the_content_inside_markers() -> None:
    special = ("<|im_start|>", "<|im_end|>", "</s>")
    marked = build(MARKERS, "byte_level", special, None, "</s>")
    samples = load_samples(_opened([_chat("a", "b", "c", "d")]), marked, Format(max_length=99))
    assert samples.closing_ids == [marked.convert_tokens_to_ids("<|im_end|>")]


def test_closing_tokens_are_the_end_token_or_what_the_template_closes_turns_with() -> None:
    llama3 = tokenizer("llama3")
    pairs = load_samples(_opened([TextPair(prompt="a", completion="b")]), llama3, Format(max_length=99))
    chats = load_samples(_opened([_chat("a", "b", "c", "d")]), llama3, Format(max_length=99))
    end_of_turn = llama3.convert_tokens_to_ids("<|eot_id|>")
    assert pairs.closing_ids == [llama3.eos_token_id]
    assert chats.closing_ids == [end_of_turn]
    assert end_tokens([chats], llama3) == sorted([llama3.eos_token_id, end_of_turn])
    assert end_tokens([pairs], llama3) == [llama3.eos_token_id]


def test_a_last_turn_that_the_template_does_not_close_ends_with_the_end_token() -> None:
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    plain = build(template, "byte_level", ("<|im_end|>",), None, "<|im_end|>")
    samples = load_samples(_opened([_chat("a", "b")]), plain, Format(max_length=99))
    assert samples.closing_ids == [plain.eos_token_id]


def test_rows_and_conversations_of_one_source_keep_their_order() -> None:
    rows: list[Any] = [
        TextPair(prompt="a", completion="b"),
        _chat("c", "d"),
        _chat("e", "f"),
        TextPair(prompt="g", completion="h"),
    ]
    samples = load_samples(_opened(rows), tokenizer("chatml"), Format(max_length=99))
    texts = [tokenizer("chatml").decode(sample.response_ids) for sample in first_rows([samples])]
    assert texts == [f"{letter}<|im_end|>" for letter in "bdfh"]


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(
        InputError,
        match=r"^model\.tokenizer: conversations, and two texts with data.as_chat, need a tokenizer with a chat",
    ):
        load_samples(_opened([_chat("a", "b")]), TOKENIZER, Format(max_length=99))


# --- several sources ---


def test_several_sources_are_loaded_in_order_and_taken_with_ids_of_their_own(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 2)):
        rows = [{"prompt": "x" * 20 if i == 0 else "p", "completion": f"{name}{i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load([f"{tmp_path}/a.jsonl", Source(path=f"{tmp_path}/b.jsonl")], "train", TOKENIZER, Format(max_length=9))
    assert [(samples.read, len(samples)) for samples in loaded] == [(3, 2), (2, 1)]
    assert [sample.sample_id for sample in first_rows(loaded)] == [1, 2, 4]
    assert [TOKENIZER.decode(sample.response_ids[:-1]) for sample in first_rows(loaded)] == ["a1", "a2", "b1"]


def test_a_limit_is_an_equal_part_of_every_source(tmp_path: Path) -> None:
    for name, count in (("a", 9), ("b", 4), ("c", 1)):
        rows = [{"prompt": "p", "completion": f"{name}{i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources: list[str | Source] = [f"{tmp_path}/{name}.jsonl" for name in "abc"]
    loaded = load(sources, "train", TOKENIZER, Format(max_length=9, limit=5))
    assert [samples.read for samples in loaded] == [2, 2, 1]
    read = [TOKENIZER.decode(sample.response_ids[:-1]) for sample in first_rows(loaded)]
    assert read == ["a0", "a1", "b0", "b1", "c0"]
    assert [samples.read for samples in load(sources, "train", TOKENIZER, Format(max_length=9))] == [9, 4, 1]


def test_no_more_samples_are_taken_than_asked_for() -> None:
    first, second = _tokenize(*[("a", str(i)) for i in range(9)]), _tokenize(*[("b", str(i)) for i in range(3)])
    assert [sample.sample_id for sample in first_rows(with_consecutive_ids([first, second]), 10)] == list(range(10))
    assert [sample.sample_id for sample in first_rows(with_consecutive_ids([first, second]), 100)] == list(range(12))


# --- shares ---


def _recipe(**data: Any) -> Recipe:
    return Recipe(output_dir="run", deepspeed="zero3.json", data=DataConfig(train="rows.jsonl", max_length=5, **data))


def test_too_many_unusable_rows_are_an_error_with_the_reasons_and_the_setting() -> None:
    samples = _tokenize(("a", "b"), ("a", "b"), ("abcde", "f"), ("abcdefg", "h"), max_length=5)
    head, *reasons = found_by(check_shares, _recipe(max_refused_share=0.4), [samples])
    assert head == (
        "rows.jsonl: 2 of 4 rows cannot be used; mend them, or raise data.max_length=5, or allow more than 40.0% of "
        "the rows (data.max_refused_share); these are"
    )
    assert reasons == [
        f"row {i}: the prompt leaves no room for a response within 5 tokens; it has {n} itself"
        for i, n in ((3, 5), (4, 7))
    ]


def test_ten_reasons_are_listed() -> None:
    samples = _tokenize(("a", "b"), *[("abcdefg", "h")] * 12, max_length=5)
    head, *reasons = found_by(check_shares, _recipe(), [samples])
    assert head.startswith("rows.jsonl: 12 of 13 rows")
    assert head.endswith("the first are")
    assert [reason.split(":")[0] for reason in reasons] == [f"row {i}" for i in range(2, 12)]


def test_bad_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    content = '{"prompt": "a", "completion": "b"}\n{\n{"prompt": "c"}\n{"prompt": "d", "completion": 5}\n'
    samples = load_samples(_file(tmp_path, content), TOKENIZER, Format(max_length=9))
    assert (samples.read, samples.refused, len(samples.too_long), len(samples)) == (4, 2, 0, 2)
    assert [sample.sample_id for sample in first_rows([samples])] == [0, 3]
    assert "line 2: expected JSON objects" in samples.reasons[0]
    assert "line 3: field 'completion' is missing" in samples.reasons[1]
    assert len(found_by(check_shares, _recipe(max_refused_share=0.4), [samples])) == 3
    assert found_by(check_shares, _recipe(max_refused_share=0.5), [samples]) == []


def test_the_row_that_a_refusal_names_is_counted_past_a_thousand_rows() -> None:
    samples = _tokenize(*[("a", "b")] * 1499, ("abcde", "f"), max_length=5)
    assert samples.reasons[0].startswith("row 1500: ")


def test_too_many_truncated_responses_are_an_error_that_names_source_and_setting() -> None:
    samples = _tokenize(("a", "bcdefg"), ("a", "b"), ("a", "b"), max_length=5)
    [message] = found_by(check_shares, _recipe(max_truncated_share=0.3), [samples])
    assert message.startswith("rows.jsonl: 1 of 3 responses are cut at data.max_length=5")
    assert message.endswith("or allow more than 30.0% of the rows (data.max_truncated_share)")


def test_the_allowed_shares_are_no_error() -> None:
    samples = _tokenize(("abcde", "f"), ("a", "bcdefg"), max_length=5)
    assert found_by(check_shares, _recipe(max_refused_share=0.5, max_truncated_share=0.5), [samples]) == []


# --- the cache ---


def _file(tmp_path: Path, content: str = '{"prompt": "a", "completion": "b"}\n') -> Opened:
    (tmp_path / "rows.jsonl").write_text(content)
    return open_source(Source(path=str(tmp_path / "rows.jsonl")), "train", Columns())


def _unread(opened: Opened) -> Opened:
    """Return the same source, but fail if its rows are read."""

    def rows() -> Iterator[TextPair]:
        raise AssertionError("read again")
        yield

    return Opened(name=opened.name, fingerprint=opened.fingerprint, rows=rows())


def _stores(cache: Path) -> int:
    return len(list(cache.glob("*/info.json")))


def test_a_second_load_reads_no_row(tmp_path: Path, cache: Path) -> None:
    rows = [TextPair(prompt="abcde", completion="f", where="line 1"), TextPair(prompt="a", completion="bcdefgh")] * 3
    first = load_samples(_opened(rows), TOKENIZER, Format(max_length=5))
    second = load_samples(_unread(_opened(rows)), byte_tokenizer(), Format(max_length=5))
    assert [str(sample) for sample in first_rows([first])] == [str(sample) for sample in first_rows([second])]
    files = {"table": None, "_reader": None}
    assert vars(first) | files == vars(second) | files
    assert _stores(cache) == 1


def test_a_used_tokenizer_finds_what_a_fresh_one_stored(tmp_path: Path) -> None:
    shipped = byte_tokenizer()  # the files of a tokenizer that was saved after a call hold such settings
    shipped.backend_tokenizer.enable_truncation(7)
    shipped.backend_tokenizer.enable_padding(length=9)
    shipped.save_pretrained(tmp_path / "tokenizer")
    fresh = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    opened = _opened([TextPair(prompt="a", completion="b" * 20)])
    samples = load_samples(opened, fresh, Format(max_length=50))
    assert len(samples[0]) == 22
    load_samples(_unread(opened), fresh, Format(max_length=50))
    load_samples(
        _unread(opened), PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer"), Format(max_length=50)
    )


def test_a_changed_file_makes_new_samples(tmp_path: Path, cache: Path) -> None:
    first = load_samples(_file(tmp_path), TOKENIZER, Format(max_length=9))
    second = load_samples(_file(tmp_path, '{"prompt": "a", "completion": "c"}\n'), TOKENIZER, Format(max_length=9))
    assert first[0].target_ids.tolist() != second[0].target_ids.tolist()
    assert first.checksum != second.checksum
    assert _stores(cache) == 2


def test_the_same_content_under_another_name_is_read_once(tmp_path: Path, cache: Path) -> None:
    opened = _file(tmp_path)
    load_samples(opened, TOKENIZER, Format(max_length=9))
    (tmp_path / "rows.jsonl").rename(tmp_path / "others.jsonl")
    moved = open_source(Source(path=str(tmp_path / "others.jsonl")), "train", Columns())
    assert load_samples(_unread(moved), TOKENIZER, Format(max_length=9)).name == str(tmp_path / "others.jsonl")


def test_every_setting_of_the_format_and_the_tokenizer_makes_new_samples(tmp_path: Path, cache: Path) -> None:
    messages = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}])
    opened = _file(tmp_path, f'{{"prompt": "a", "completion": "b", "other": "c", "messages": {messages}}}\n')
    other_template = build(CHATML.replace("assistant", "model"), "byte_level", ("<|im_end|>",), None, "<|im_end|>")
    same_words = build(CHATML, "byte_level", ("<|im_end|>",), None, "<|im_end|>")
    formats = [
        Format(max_length=90),
        Format(max_length=91),
        Format(max_length=90, limit=1),
        Format(max_length=90, assistant_turns="last"),
        Format(max_length=90, columns=Columns(completion="other")),
    ]
    for number, (form, given) in enumerate(
        [*((form, TOKENIZER) for form in formats), (formats[0], same_words), (formats[0], other_template)], start=1
    ):
        load_samples(_file(tmp_path, (tmp_path / "rows.jsonl").read_text()), given, form)
        assert _stores(cache) == number
    assert opened.fingerprint


def test_what_was_half_written_is_made_anew(tmp_path: Path, cache: Path) -> None:
    opened = _opened([TextPair(prompt="a", completion="b")])
    first = load_samples(opened, TOKENIZER, Format(max_length=9))
    expected = first[0].target_ids.tolist()
    content = (first.folder / "samples.arrow").read_bytes()
    partial = first.folder.with_suffix(".partial")
    first.folder.rename(partial)
    (partial / "info.json").unlink()
    (partial / "samples.arrow").unlink()
    (partial / "samples.arrow").write_bytes(content[:100])
    again = load_samples(opened, TOKENIZER, Format(max_length=9))
    assert again[0].target_ids.tolist() == expected
    assert not partial.exists()


def test_rows_that_cannot_be_read_leave_no_samples(tmp_path: Path, cache: Path) -> None:
    bad = "{\n"
    for _ in range(2):
        with pytest.raises(InputError, match=r"no usable row among 1: .*line 1: expected JSON objects"):
            load_samples(_file(tmp_path, bad), TOKENIZER, Format(max_length=9))
        assert _stores(cache) == 0
        assert not list(cache.glob("*.partial"))
    assert load_samples(_file(tmp_path), TOKENIZER, Format(max_length=9)).read == 1


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(InputError, match=r"^HF_DATASETS_CACHE: .* cannot be written to"):
        _tokenize(("a", "b"))


def _load_in_process(path: str, cache: str, log: str, connection: Connection) -> None:
    """Load a file's samples, and write a line to `log` if its rows were read."""
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    opened = open_source(Source(path=path), "train", Columns())

    def rows() -> Iterator[Row]:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        yield from opened.rows

    watched = Opened(name=opened.name, fingerprint=opened.fingerprint, rows=rows())
    given = byte_tokenizer()
    connection.send("ready")
    connection.recv()
    try:
        samples = load_samples(watched, given, Format(max_length=50))
        connection.send([ids.tolist() for ids in samples.table["input_ids"][:]])
    except InputError as error:
        connection.send(str(error))


def _in_processes(tmp_path: Path, content: str, count: int = 3) -> tuple[list[Any], int]:
    """Load in several processes at once; return each result, and how many processes read the rows."""
    (tmp_path / "rows.jsonl").write_text(content)
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for _ in range(count):
        mine, theirs = context.Pipe()
        arguments = (str(tmp_path / "rows.jsonl"), str(tmp_path / "shared"), str(tmp_path / "log"), theirs)
        processes.append(context.Process(target=_load_in_process, args=arguments))
        processes[-1].start()
        pipes.append(mine)
    for pipe in pipes:
        assert pipe.recv() == "ready"
    for pipe in pipes:
        pipe.send("go")
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return results, len((tmp_path / "log").read_text().splitlines())


def test_of_several_processes_one_tokenizes_and_all_get_the_same_samples(tmp_path: Path) -> None:
    rows = "".join(f'{{"prompt": "{number}", "completion": "b"}}\n' for number in range(2_000))
    results, readers = _in_processes(tmp_path, rows)
    assert readers == 1
    assert [len(result) for result in results] == [2_000] * 3
    assert results[0] == results[1] == results[2]


def test_of_several_processes_one_meets_bad_rows_and_all_say_so(tmp_path: Path) -> None:
    results, readers = _in_processes(tmp_path, "{\n" * 2_000)
    assert readers == 1
    assert len(set(results)) == 1
    head, *reasons = results[0].splitlines()
    assert head == f"{tmp_path}/rows.jsonl: no usable row among 2000"
    assert reasons[0].startswith(f"{tmp_path}/rows.jsonl, line 1: expected JSON objects")


def test_samples_are_mapped_from_the_disk_and_not_held(tmp_path: Path) -> None:
    samples = _tokenize(*(("a", "b" * 80) for _ in range(3)))
    files = [file["filename"] for file in samples.table.cache_files]
    assert files == [str(samples.folder / "samples.arrow")]
    assert list(chain(samples[0].target_ids))


@pytest.mark.parametrize("template", ["chatml", "chatml with generation markers", "llama2", "qwen3"])
def test_part_lengths_are_those_of_prompt_and_last_response(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (encoding, samples_module):
        monkeypatch.setattr(module, "CHUNK_ROWS", 20)
    chat_tokenizer = tokenizer(template)
    texts = ["a", "the answer", "How many apples are left?", "b " * 30]
    rows = [
        Conversation(
            messages=[
                {"role": role, "content": texts[(i + j + turn) % 4]}
                for turn in range(1 + i % 3)
                for j, role in enumerate(("user", "assistant"))
            ]
        )
        for i in range(24)
    ]
    samples = load_samples(_opened(rows), chat_tokenizer, Format(max_length=70))
    assert samples.table.data.column("turns").num_chunks == 2
    assert samples.truncated
    prompts, responses = samples.part_lengths()
    assert (prompts.dtype, responses.dtype) == (np.int64, np.int64)
    expected = [(len(sample.prompt_ids), len(sample.response_ids)) for sample in first_rows([samples])]
    assert list(zip(prompts.tolist(), responses.tolist(), strict=True)) == expected


# --- rows of two texts ---


@pytest.mark.parametrize("family", ["llama2", "mistral", "gemma", "chatml", "line ends that merge"])
@pytest.mark.parametrize("completion", ["42", " 42", "\n42", "\n\n it", "é"])
def test_prompt_and_completion_are_joined_as_one_text(family: str, completion: str) -> None:
    plain = tokenizer(family)
    samples = load_samples(
        _opened([TextPair(prompt="What is 12", completion=completion)]), plain, Format(max_length=99, as_chat=False)
    )
    text = plain.decode(samples[0].target_ids, skip_special_tokens=True)
    assert text.removeprefix(" ") == f"What is 12{completion}"  # some tokenizers put a space before the prompt


def test_a_prompt_template_stands_around_the_prompt() -> None:
    form = Format(max_length=99, prompt_template="Q: {prompt}{}\nA: ")
    samples = load_samples(_opened([TextPair(prompt="{x}", completion="y")]), TOKENIZER, form)
    assert _only(samples) == (_ids("Q: {x}{}\nA: "), [*_ids("y"), END])


def test_texts_as_a_chat_are_the_conversation_of_a_question_and_an_answer() -> None:
    pair = TextPair(prompt="a", completion="b")
    form = Format(max_length=99, as_chat=True, prompt_template="{prompt}?")
    samples = load_samples(_opened([pair]), tokenizer("chatml"), form)
    expected = load_samples(_opened([_chat("a?", "b")]), tokenizer("chatml"), Format(max_length=99))
    assert samples[0].target_ids.tolist() == expected[0].target_ids.tolist()
    assert (samples.conversations, samples.closing_ids) == (1, expected.closing_ids)
    with pytest.raises(InputError, match="need a tokenizer with a chat"):
        load_samples(_opened([pair]), TOKENIZER, form)


@pytest.mark.parametrize(("as_chat", "said"), [(None, True), (False, False)])
def test_texts_without_the_chat_template_are_said(
    as_chat: bool | None, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pair = TextPair(prompt="a", completion="b")
    for _ in range(2):  # tokenized, and from the cache
        caplog.clear()
        load_samples(_opened([pair]), tokenizer("chatml"), Format(max_length=99, as_chat=as_chat))
        assert ("read without the tokenizer's chat template; as_chat: true" in caplog.text) == said
    caplog.clear()
    load_samples(_opened([pair]), TOKENIZER, Format(max_length=99))
    assert not caplog.text


# --- the ends of turns, and what is named ---

CLOSED_BY_THE_NEXT = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"


def test_a_last_turn_that_the_next_opening_would_close_ends_with_an_end_token_of_the_model() -> None:
    special = ("<|user|>", "<|assistant|>", "<|endoftext|>", "<|other|>")
    glm = build(CLOSED_BY_THE_NEXT, "byte_level", special, None, "<|endoftext|>")
    user, other, end = glm.convert_tokens_to_ids(["<|user|>", "<|other|>", "<|endoftext|>"])
    for end_ids, expected in (((), end), ((user, end), end), ((other, user), other)):
        form = Format(max_length=99, end_ids=end_ids)
        samples = load_samples(_opened([_chat("a", "b", "c", "d")]), glm, form)
        target = samples[0].target_ids
        (_, _, first), (_, _, last) = _turns(samples)
        assert (target[first - 1], target[last - 1]) == (user, expected)
        assert end_tokens([samples], glm) == sorted({user, end, expected, *end_ids})


def test_what_a_template_hides_in_earlier_turns_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    template = CHATML_GENERATION.replace(
        "{%- if m['content'] %}", "{{- m['reasoning_content'] if loop.last }}{%- if m['content'] %}"
    )
    template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    plain = build(template, "byte_level", ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>")
    chats = [_chat("a", "b", "c", "d", where=f"line {i}") for i in range(3)]
    for chat in chats[1:]:
        chat.messages[1]["reasoning_content"] = "since"
    for _ in range(2):  # tokenized, and from the cache
        caplog.clear()
        load_samples(_opened(chats), plain, Format(max_length=99))
        [record] = caplog.records
        assert "in 2 of 3 rows the chat template shows a turn otherwise" in record.getMessage()
        assert "line 1, message 2: the text does not show all of it" in record.getMessage()


def test_a_prompt_template_is_said_to_have_no_effect_on_conversations(caplog: pytest.LogCaptureFixture) -> None:
    form = Format(max_length=99, as_chat=True, prompt_template="Q: {prompt}")
    load_samples(_opened([_chat("a", "b")]), tokenizer("chatml"), form)
    assert "no row has two texts; data.prompt_template has no effect" in caplog.text
    caplog.clear()
    load_samples(_opened([TextPair(prompt="a", completion="b")]), tokenizer("chatml"), form)
    assert "has no effect" not in caplog.text


def test_an_unknown_field_of_messages_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    chats = [_chat("a", "b", where=f"line {i}") for i in range(3)]
    for chat in chats[1:]:
        chat.messages[1]["mood"] = "fine"
    load_samples(_opened(chats), tokenizer("chatml"), Format(max_length=99))
    [record] = caplog.records
    assert record.getMessage().startswith("line 1: most chat templates ignore a field 'mood'")


DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"


def test_a_template_is_told_the_day_of_the_settings() -> None:
    plain = build(DATED, "byte_level", ("<|im_end|>",), None, "<|im_end|>")
    for day, written in (("2026-01-31", "31 Jan 2026"), ("2025-02-01", "01 Feb 2025")):
        samples = load_samples(_opened([_chat("a", "b")]), plain, Format(max_length=99, date=day))
        assert plain.decode(samples[0].target_ids).startswith(f"{written}a")
