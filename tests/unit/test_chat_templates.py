"""Every chat template that TRL carries: which conversations it takes, and what of them is learned."""

import re
from contextlib import suppress
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from selfgen_ds.chat.conversation import Conversation, forms
from selfgen_ds.chat.encoder import ChatEncoder
from tests.chat_templates import KINDS, PAGE, TABLE, conversation, refusal, table, templates, tokenizer_of
from tests.tiers import sweep

EMPTY = re.compile(r"\s*(<think>)?\s*</think>\s*")
_CHECKED = ["qwen3", "glm4moe", "gptoss", "llama3"]
EVERY_TEMPLATE = sweep("name", [*_CHECKED, *(name for name in templates() if name not in _CHECKED)], check=4)


@pytest.mark.test
def test_the_table_is_that_of_the_page_and_nearly_all_that_is_shown_can_be_learned() -> None:
    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    whole = table()
    assert found[0].removeprefix(found[1]) == whole
    rows = [(len(cells[0].split(", ")), cells[1:]) for cells in _cells(whole)]
    learned, refused = (sum(number * cells.count(word) for number, cells in rows) for word in ("yes", "no"))
    assert learned / (learned + refused) > 0.95


def _cells(whole: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in whole.splitlines()[2:]]


@EVERY_TEMPLATE
def test_a_turn_is_what_generation_would_have_to_produce(name: str) -> None:
    tokenizer = tokenizer_of(templates()[name])
    encoder = ChatEncoder(tokenizer, "all")
    # After a tool's result this template writes a header before its markers, and none in its generation prompt.
    header = "<|turn>model\n" if name == "diffusion_gemma_training" else ""
    for kind in KINDS:
        chat = conversation(kind)
        if refusal(tokenizer, chat):
            continue
        rendered = encoder.render(chat)
        ((ids, turns),) = encoder.encode([chat])
        learned = [tokenizer.decode(ids[start:end]) for start, _, end in turns]
        assert not any("GIVEN" in text for text in learned), kind
        assert _written("".join(learned)) == _written(tokenizer.decode(ids)), kind
        assert not any(re.search(r"<think>\s*</think>", text) for text in learned), kind
        ended = [end > content_end for _, content_end, end in turns]
        assert ended[-1], kind
        assert all(ended) or rendered.unlike_inference, kind
        messages = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        assert len(turns) == len(messages), kind
        for i, (start, content_end, end) in zip(messages, turns, strict=True):
            if rendered.unlike_inference and i < messages[-1]:
                continue
            before = tokenizer.decode(ids[:start]).removesuffix(header)
            prompts = _prompts(tokenizer, replace(chat, messages=chat.messages[:i]))
            assert any(_continues(before, prompt.removesuffix(header)) for prompt in prompts), kind
            answer, whole = (tokenizer.decode(ids[start:of]).rstrip() for of in (content_end, end))
            ends = _answered(tokenizer, replace(chat, messages=chat.messages[: i + 1]))
            assert any(_ends_with(tokenizer, text, answer) for text in ends), kind
            assert any(_ends_with(tokenizer, text, whole) for text in ends) or _closed_by_the_next(tokenizer), kind


def _answered(tokenizer: PreTrainedTokenizerFast, chat: Conversation) -> list[str]:
    """Return the text of a conversation that ends with an answer, in every form that the template takes."""
    texts = []
    for _, form in forms(0, chat):
        with suppress(Exception):  # a template can raise anything
            texts.append(tokenizer.apply_chat_template(form.messages, tools=form.tools, tokenize=False).rstrip())
    return texts


def _ends_with(tokenizer: PreTrainedTokenizerFast, text: str, end: str) -> bool:
    """Return whether only special tokens and the syntax of a tool call follow the last place of `end` in a text."""
    rest = text[text.rindex(end) + len(end) :] if end in text else "no end"
    for token in [*tokenizer.all_special_tokens, *re.findall(r"</?\w+>", rest)]:
        rest = rest.replace(token, "")
    return not re.search(r"\w", rest)


def _closed_by_the_next(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether the template writes no special token after a last message."""
    question, answer = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    return any(text.endswith("x") for text in _answered(tokenizer, Conversation(messages=[question, answer])))


def _written(text: str) -> list[str]:
    return re.findall(r"WRITTEN\d", text)


def _prompts(tokenizer: PreTrainedTokenizerFast, chat: Conversation) -> list[str]:
    """Return what plain transformers gives a model to continue a conversation, with reasoning and without."""
    prompts = []
    for _, form in forms(0, chat):
        for settings in ({}, {"enable_thinking": False}, {"thinking": False}):
            with suppress(Exception):  # a template can raise anything
                given = {"tools": form.tools, "tokenize": False, "add_generation_prompt": True}
                prompts.append(tokenizer.apply_chat_template(form.messages, **given, **settings))
    return prompts


def _continues(text: str, prompt: str) -> bool:
    """Return whether a text is the end of a prompt, as far as it also opens or closes no reasoning."""
    text, prompt = (given[given.rfind("GIVEN") :] for given in (text, prompt))
    return prompt.startswith(text) or (text.startswith(prompt) and bool(EMPTY.fullmatch(text, len(prompt))))
