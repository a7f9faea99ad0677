"""Where turns start and end under templates as models have them: moved tools, several closings, opened reasoning."""

import json
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.chat.encoder import ChatEncoder
from selfgen_ds.data.message_checks import conversation
from selfgen_ds.errors import InputError
from tests.chat_templates import templates, tokenizer_of
from tests.chat_tokenizers import CHATML, CHATML_GENERATION, build

PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + (m['content'] or '') }}"
    "{% for call in m['tool_calls'] or [] %}{{ '<|call|>' + (call['function'] | tojson) + '<|/call|>' }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
"""Closes a turn by `<|end|>`, and a text that nothing follows by the end token as well."""
MOVING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if loop.index0 == messages | map(attribute='role') | list | length - 1 or not (messages[loop.index0 + 1:]"
    " | selectattr('role', 'equalto', 'user') | list) %}{{ '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['tool_calls'] %}{{ '[CALLS]' + (m['tool_calls'] | map(attribute='function') | list | tojson) + '</s>' }}"
    "{% elif m['role'] == 'tool' %}{{ '[RESULT]' + (m['content'] | tojson) + '[/RESULT]' }}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
"""Shows the tools before the last message of the user, as Mistral's templates do, and results as JSON."""
_MOVING_TOKENS = ("[TOOLS]", "[/TOOLS]", "[INST]", "[/INST]", "[CALLS]", "[RESULT]", "[/RESULT]")
_PHI_TOKENS = ("<|user|>", "<|assistant|>", "<|tool|>", "<|call|>", "<|/call|>", "<|end|>", "<|endoftext|>")


def _chat(*contents: str) -> Conversation:
    """Return a conversation of contents that the user and the assistant write in turn."""
    roles = ["user", "assistant"] * (len(contents) // 2)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return Conversation(messages=messages, where="row 1")


def _learned(chat_tokenizer: PreTrainedTokenizerFast, chat: Conversation) -> list[tuple[str, str]]:
    """Return the learned turns: what may be replaced, and what closes it."""
    ((ids, turns),) = ChatEncoder(chat_tokenizer, "all").encode([chat])
    return [(chat_tokenizer.decode(ids[a:b]), chat_tokenizer.decode(ids[b:c])) for a, b, c in turns]


def _called(result: str, arguments: dict[str, Any] | str) -> Conversation:
    function = {"name": "add", "arguments": arguments}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "1 and 2?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "Thank you."},
        {"role": "assistant", "content": "Welcome."},
    ]
    return Conversation(messages=messages, tools=[{"type": "function", "function": {"name": "add"}}], where="row 1")


def test_a_call_is_learned_from_its_start_if_the_tools_move_to_a_later_message() -> None:
    moving = build(MOVING, "byte_level", _MOVING_TOKENS, None, "</s>")
    call = '[CALLS][{"name": "add", "arguments": {"a": 1}}]'
    expected = [(call, "</s>"), ("It is 3.", "</s>"), ("Welcome.", "</s>")]
    assert _learned(moving, _called("3", {"a": 1})) == expected
    rendered = ChatEncoder(moving, "all").render(_called("3", {"a": 1}))
    assert "message 2: the messages before it look otherwise" in rendered.unlike_inference


@pytest.mark.parametrize("result", ['{"sum": 3}', 'a\n"b" \\', "<|im_end|>", "é [RESULT]", {"a": "<|im_end|>"}])
def test_a_result_may_stand_escaped_in_the_text(result: Any) -> None:
    moving = build(MOVING, "byte_level", (*_MOVING_TOKENS, "<|im_end|>"), None, "</s>")
    chat = _called("", {"a": 1}).with_message(2, {"role": "tool", "content": result})
    assert [closing for _, closing in _learned(moving, chat)] == ["</s>"] * 3
    ((ids, _),) = ChatEncoder(moving, "all").encode([chat])
    special = set(moving.convert_tokens_to_ids(["[RESULT]", "<|im_end|>"]))
    assert sum(token in special for token in ids) == 1, "what the result spells stays text"


@pytest.mark.parametrize("result", [{"sum": 3, "by": {"hand": True}}, [1, {"sum": 3}]])
def test_a_result_may_be_an_object_or_a_list(result: Any) -> None:
    """A template may print it as JSON; one that takes texts alone is given its JSON."""
    moving = build(MOVING, "byte_level", _MOVING_TOKENS, None, "</s>")
    for template in (moving, build(PHI, "byte_level", _PHI_TOKENS, None, "<|endoftext|>")):
        chat = replace(_called("", {"a": 1}), tools=[{"name": "add"}] if template is moving else None)
        rendered = ChatEncoder(template, "all").render(chat.with_message(2, {"role": "tool", "content": result}))
        assert json.dumps(result) in rendered.text
        answers = [rendered.text[start:end] for start, end, _ in rendered.turns]
        assert answers[1:] == ["It is 3.", "Welcome."]


def test_a_result_that_the_template_leaves_out_is_refused() -> None:
    silent = build(MOVING.replace("m['content'] | tojson", "'done'"), "byte_level", _MOVING_TOKENS, None, "</s>")
    chat = _called("", {"a": 1}).with_message(2, {"role": "tool", "content": {"sum": 3}})
    with pytest.raises(InputError, match="row 1: the chat template leaves out the content of message 3"):
        ChatEncoder(silent, "all").render(chat)


def test_a_turn_ends_at_the_token_that_closes_it_whatever_follows() -> None:
    phi = build(PHI, "byte_level", _PHI_TOKENS, None, "<|endoftext|>")
    call = '<|call|>{"name": "add", "arguments": {"a": 1}}'
    expected = [(call, "<|/call|><|end|>"), ("It is 3.", "<|end|>"), ("Welcome.", "<|end|><|endoftext|>")]
    chat = replace(_called("3", {"a": 1}), tools=None)
    assert _learned(phi, chat) == expected


def test_a_turn_that_ends_otherwise_than_at_inference_learns_no_end() -> None:
    last = "'<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>'"
    harmony = PHI.replace("{{ '<|end|>' }}", f"{{{{ {last} }}}}")
    harmony = harmony.replace("{% else %}{{ eos_token }}", "")
    tokens = build(harmony, "byte_level", (*_PHI_TOKENS, "<|return|>"), None, "<|endoftext|>")
    chat = _chat("a", "b", "c", "d")
    assert _learned(tokens, chat) == [("b", ""), ("d", "<|return|>")]
    assert "message 2: it ends otherwise" in ChatEncoder(tokens, "all").render(chat).unlike_inference


def test_a_template_that_raises_without_later_messages_learns_no_later_message() -> None:
    raising = CHATML_GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    raising += "{% if messages[-1]['tool_calls'] %}{{ raise_exception('a call is last') }}{% endif %}"
    plain = build(raising, "byte_level", ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>")
    learned = _learned(plain, replace(_called("3", {"a": 1}), tools=None))
    assert not any("Thank" in text for pair in learned for text in pair)
    assert [closing for _, closing in learned] == ["<|im_end|>"] * 3


def test_reasoning_that_the_generation_prompt_opens_is_learned_without_its_opening() -> None:
    opening = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'")
    plain = build(opening, "byte_level", ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>")
    chat = _chat("a", "<think>\nwhy\n</think>\n\nb")
    assert _learned(plain, chat) == [("why\n</think>\n\nb", "<|im_end|>")]
    without = _chat("a", "b")
    assert _learned(plain, without) == [("b", "<|im_end|>")]
    assert "such as `<think>`, is not shown" in ChatEncoder(plain, "all").render(without).unlike_inference


def test_all_tokens_that_close_a_turn_are_learned() -> None:
    two = CHATML.replace("<|im_end|>", "<|/answer|><|im_end|>")
    plain = build(two, "byte_level", ("<|im_start|>", "<|im_end|>", "<|/answer|>"), None, "<|im_end|>")
    chat = _chat("a", "b")
    assert _learned(plain, chat) == [("b", "<|/answer|><|im_end|>")]


@pytest.mark.parametrize("given", ['{"a": true}', {"a": True}])
@pytest.mark.parametrize("written", ["c['function']['arguments']", "c['function']['arguments'] | tojson"])
def test_arguments_are_learned_as_json_whatever_the_template_prints(written: str, given: Any) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{{ m['content'] }}"
        f"{{% for c in m['tool_calls'] or [] %}}{{{{ {written} }}}}{{% endfor %}}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    plain = build(template, "byte_level", ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>")
    chat = conversation(replace(_called("3", given), tools=None).messages[:2], {}, "row 1", "row 1")
    assert _learned(plain, chat) == [('{"a": true}', "<|im_end|>")]


def test_a_call_after_a_result_that_ends_otherwise_as_the_last_message_starts_after_its_opening() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{{ m['content'] or '' }}"
        "{% for call in m['tool_calls'] or [] %}{{ '<call>' + (call['function'] | tojson) + '</call>' }}{% endfor %}"
        "{% if m['role'] == 'tool' and not loop.last %}{{ '\\n' }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    plain = build(template, "byte_level", ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>")
    once = replace(_called("3", {"a": 1}), tools=None)
    twice = replace(once, messages=[*once.messages[:3], *once.messages[1:]])
    call = '<call>{"name": "add", "arguments": {"a": 1}}</call>'
    assert [text for text, _ in _learned(plain, twice)] == [call, call, "It is 3.", "Welcome."]


def test_an_unlearned_call_after_an_empty_result_is_not_learned() -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": i}}} for i in range(2)]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "q"}]
    for call in calls:
        messages += [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": ""}]
    messages.append({"role": "assistant", "content": "good"})
    chat = Conversation(messages=messages, unlearned=frozenset([3]), where="row 1")
    learned = _learned(tokenizer_of(templates()["qwen3_training"]), chat)
    text = "".join(answer for answer, _ in learned)
    assert '"a": 0' in text
    assert '"a": 1' not in text
    assert learned[-1][0].endswith("good")


def test_an_answer_that_the_template_does_not_show_is_refused() -> None:
    qwen = tokenizer_of(templates()["qwen3"])
    with pytest.raises(InputError, match="row 1, message 2: the text does not show where it is"):
        ChatEncoder(qwen, "all").render(_chat("question", "</think>"))


def test_arguments_keep_their_letters_if_the_template_takes_them_as_json() -> None:
    takes_text = build(
        PHI.replace("call['function'] | tojson", "'' + call['function']['arguments']"),
        "byte_level",
        _PHI_TOKENS,
        None,
        "<|endoftext|>",
    )
    rendered = ChatEncoder(takes_text, "all").render(replace(_called("3", {"city": "Zürich"}), tools=None))
    assert 'call|>{"city": "Zürich"}<|/call' in rendered.text


def test_reasoning_without_an_answer_ends_at_the_last_closing_token() -> None:
    oss = tokenizer_of(templates()["gptoss"])
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "reasoning_content": "why"}]
    learned = _learned(oss, Conversation(messages=messages, where="row 1"))
    assert learned[-1][1].endswith("<|return|>")
    assert "final" in learned[-1][0]


def test_a_prompt_that_opens_reasoning_only_on_request_is_a_prompt_too() -> None:
    """The recipe's rows think, so their model is asked to: the template then supplies `<think>`."""
    template = tokenizer_of(templates()["qwen3_5_nothink"])
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "done", "reasoning_content": "why"}]
    ((answer, _),) = _learned(template, Conversation(messages=messages, where="row 1"))
    assert answer.startswith("why")


@pytest.mark.parametrize(
    ("name", "messages", "tools", "reason"),
    [
        ("idefics3", [{"content": "x", "reasoning_content": "why"}], None, "leaves out the reasoning of message 2"),
        ("idefics3", [{"content": "x"}], [{"name": "add"}], "leaves out the tools"),
        ("llama3", [{"content": [{"type": "text", "text": "x"}]}], [{"name": "add"}], "leaves out the tools"),
    ],
)
def test_the_reason_is_that_of_the_form_which_gets_furthest(
    name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, reason: str
) -> None:
    answers = [{"role": "assistant"} | message for message in messages]
    chat = Conversation(messages=[{"role": "user", "content": "q"}, *answers], tools=tools, where="row 1")
    with pytest.raises(InputError, match=reason):
        ChatEncoder(tokenizer_of(templates()[name]), "all").render(chat)


@pytest.mark.parametrize(
    ("answer", "asked_with"),
    [
        ({"content": "4"}, {"enable_thinking": False}),
        ({"content": "4", "reasoning_content": "2 and 2"}, {}),
    ],
)
def test_the_prompt_that_an_answer_follows_is_named_if_it_is_not_the_default(
    answer: dict[str, Any], asked_with: dict[str, Any]
) -> None:
    qwen = tokenizer_of(templates()["qwen3"])
    chat = Conversation(messages=[{"role": "user", "content": "2 + 2?"}, {"role": "assistant"} | answer], where="row 1")
    assert ChatEncoder(qwen, "all").render(chat).asked_with == asked_with
