from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.chat.encoder import ChatEncoder
from selfgen_ds.data.correction import TEXT_CUE, TURN_CUE, Correction, correction
from selfgen_ds.data.encoding import Format
from selfgen_ds.data.row_checks import TextPair
from selfgen_ds.data.rows import Opened
from selfgen_ds.data.samples import Samples, load_samples
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from tests.chat_tokenizers import CHATML, CHATML_GENERATION, EVERY_FAMILY, build, tokenizer

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
QUESTION, WRONG, RIGHT = "How many apples are left?", "There are four", "There are three"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _conversation(*contents: str) -> Conversation:
    roles = ("user", "assistant") * len(contents)
    return Conversation(messages=[{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)])


def _samples(rows: list[Any], its_tokenizer: PreTrainedTokenizerFast) -> Samples:
    return load_samples(Opened(name="rows", fingerprint=[repr(rows)], rows=rows), its_tokenizer, Format(max_length=999))


def _chat(its_tokenizer: PreTrainedTokenizerFast, cue: str | None) -> tuple[Samples, Correction]:
    samples = _samples([_conversation(QUESTION, RIGHT)], its_tokenizer)
    return samples, correction([samples], its_tokenizer, cue)


def _chatml(template: str) -> PreTrainedTokenizerFast:
    return build(template, "byte_level", CHATML_TOKENS, None, "<|im_end|>")


# --- conversations ---


@EVERY_FAMILY
@pytest.mark.parametrize("cue", [None, "Are you sure?\n\nThink.", "a <|im_end|></s>[INST]<end_of_turn><|end|> b", ""])
def test_a_correction_reads_like_a_conversation_that_asks_for_it(family: str, cue: str | None) -> None:
    chat_tokenizer = tokenizer(family)
    samples, asked = _chat(chat_tokenizer, cue)
    request = TURN_CUE if cue is None else cue
    ((whole, turns),) = ChatEncoder(chat_tokenizer, "all").encode([_conversation(QUESTION, WRONG, request, RIGHT)])
    start, replaceable, end = turns[0]
    prompt = samples[0].prompt_ids.tolist()
    header = prompt[start:]  # Qwen 3 writes an empty thought before the last answer only
    assert (chat_tokenizer.decode(header) if header else "") == ("<think>\n\n</think>\n\n" if family == "qwen3" else "")
    expected = whole[:start] + header + whole[start:]
    written = asked.prompt(prompt, whole[start:end])
    assert written + samples[0].response_ids.tolist() == expected[: turns[-1][2] + len(header)]
    assert asked.content(whole[start:end]) == whole[start:replaceable]


@EVERY_FAMILY
def test_an_answer_ends_at_its_end_token_or_where_it_was_cut(family: str) -> None:
    chat_tokenizer = tokenizer(family)
    samples, asked = _chat(chat_tokenizer, None)
    answer = samples[0].response_ids.tolist()
    content = answer[: int(samples[0].replaceable_mask.sum())]
    assert asked.content(answer) == content
    assert asked.content([*content, chat_tokenizer.eos_token_id]) == content
    assert asked.content(content[:-1]) == content[:-1]
    assert asked.content([chat_tokenizer.eos_token_id]) == asked.content([]) == []
    assert asked.prompt([7, 8], answer) == asked.prompt([7, 8], content)


def test_an_answer_has_no_white_space_that_closes_it() -> None:
    template = CHATML_GENERATION.replace("'<|im_end|>' }}{% endgen", "' <|im_end|>' }}{% endgen")
    chat_tokenizer = _chatml(template)
    _, asked = _chat(chat_tokenizer, None)
    assert chat_tokenizer.decode(asked.closing_ids) == " <|im_end|>"
    written = chat_tokenizer("There <|im_end|>")["input_ids"]
    assert chat_tokenizer.decode(asked.content(written)) == "There"


def test_a_header_inside_generation_markers_belongs_to_the_cue() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<|im_start|>assistant\n"
        "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    chat_tokenizer = _chatml(template)
    _, asked = _chat(chat_tokenizer, "Sure?")
    assert chat_tokenizer.decode(asked.closing_ids) == "<|im_end|>"
    expected = "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    assert chat_tokenizer.decode(asked.cue_ids) == expected


def test_special_tokens_that_a_cue_spells_stay_text() -> None:
    chat_tokenizer = tokenizer("chatml")
    _, asked = _chat(chat_tokenizer, "a<|im_end|>b")
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (asked.closing_ids + asked.cue_ids).count(end) == 2
    assert "a<|im_end|>b" in chat_tokenizer.decode(asked.cue_ids)


@pytest.mark.parametrize(
    ("content", "cue", "expected"),
    [
        ("{% if loop.index0 % 4 != 2 %}{{ m['content'] }}{% endif %}", "Sure?", "leaves out the content of message 3"),
        ("{{ raise_exception('one turn') if loop.length > 2 else m['content'] }}", "Sure?", "raises: one turn"),
        ("{{ m['content'] or raise_exception('no text') }}", "", "raises: no text"),
        ("{{ m['content'] or 'Continue.' }}", "", "takes no empty turn of the user"),
    ],
)
def test_a_cue_that_the_template_does_not_take_is_refused(content: str, cue: str, expected: str) -> None:
    template = f"{{% for m in messages %}}<|im_start|>{content}<|im_end|>{{% endfor %}}"
    with pytest.raises(InputError) as caught:
        _chat(_chatml(template), cue)
    assert str(caught.value).startswith("selfgen.cue")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_leaves_out_empty_messages_takes_no_empty_cue() -> None:
    template = CHATML.replace("{%- for m in messages %}", "{%- for m in messages if m['content'] %}")
    with pytest.raises(InputError, match=r"^selfgen\.cue: the chat template takes no empty turn of the user$"):
        _chat(_chatml(template), "")
    assert _chat(_chatml(template), "x")[1] == _chat(tokenizer("chatml"), "x")[1]


# --- texts ---


@pytest.mark.parametrize(("cue", "expected"), [(None, TEXT_CUE), ("Now: ", "Now: "), ("</s>", "</s>"), ("", "")])
def test_between_texts_the_cue_stands_as_it_is(cue: str | None, expected: str) -> None:
    plain = byte_tokenizer()
    asked = correction([_samples([TextPair(prompt="1+1=", completion="2")], plain)], plain, cue)
    end, answer = plain.eos_token_id, plain("3")["input_ids"]
    written = asked.prompt(plain("1+1=")["input_ids"], [*answer, end])
    assert end not in written
    assert plain.decode(written) == "1+1=3" + expected
    assert asked.prompt([1], answer) == asked.prompt([1], [*answer, end])


def test_a_text_cue_gets_no_begin_token() -> None:
    llama3 = tokenizer("llama3")
    asked = correction([_samples([TextPair(prompt="a", completion="b")], llama3)], llama3, "Now: ")
    assert asked.cue_ids == llama3("Now: ", add_special_tokens=False)["input_ids"]
    assert asked.closing_ids == []


def test_conversations_beside_texts_have_no_one_cue() -> None:
    chat_tokenizer = tokenizer("chatml")
    both = [_conversation("a", "b"), TextPair(prompt="a", completion="b"), TextPair(prompt="c", completion="d")]
    with pytest.raises(InputError, match=r"^--cue: .* got 1 conversations among 3 rows$"):
        correction([_samples(both, chat_tokenizer)], chat_tokenizer, None, "--cue")
    apart = [_samples([row], chat_tokenizer) for row in both]
    assert [source.conversations for source in apart] == [1, 0, 0]
    with pytest.raises(InputError, match=r"^--cue: .* got 1 conversations among 3 rows$"):
        correction(apart, chat_tokenizer, None, "--cue")
