import re
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.chat.encoder import ChatEncoder
from selfgen_ds.errors import InputError
from tests.chat_tokenizers import CHATML, CHATML_GENERATION, EVERY_FAMILY, FAMILIES, build, tokenizer

Messages = list[dict[str, Any]]

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def _conversation(*contents: str, system: str | None = None) -> Messages:
    """Make a conversation of contents that the user and the assistant write in turn."""
    roles = ["user", "assistant"] * (len(contents) // 2)
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


TWO_TURNS = _conversation("How many apples are left?", "There are three.", "Thank you!", "You are welcome.")


def _encode(
    chat_tokenizer: PreTrainedTokenizerFast, messages: Messages, assistant_turns: str = "all", **others: Any
) -> tuple[list[int], list[list[int]]]:
    encoder = ChatEncoder(chat_tokenizer, assistant_turns)
    (encoded,) = encoder.encode([Conversation(messages=messages, where="rows.jsonl, line 7", **others)])
    return encoded


def _chatml(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    return build(template, "byte_level", CHATML_TOKENS, None, "<|im_end|>")


def _refusal(template: str, messages: Messages = TWO_TURNS, **others: Any) -> str:
    with pytest.raises(InputError) as caught:
        _encode(_chatml(template), messages, **others)
    assert str(caught.value).startswith("rows.jsonl, line 7")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- token ids ---


SNIPPETS = [
    "user", "assistant", "system", "[INST]", " [/INST]", "<<SYS>>", "<</SYS>>\n\n", "<think>\n\n</think>", "model\n",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<bos>", "<end_of_turn>", "<start_of_turn>",
    "<|eot_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>", "<|end|>", "\n", "\n\n", " ", "\t", "{{ x }}", "▁",
    "▁a", "apples", "é", "😀",
]  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=8)
CONTENT = st.lists(st.sampled_from(SNIPPETS) | TEXT, min_size=1, max_size=6).map("".join).filter(bool)


@EVERY_FAMILY
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(contents=st.tuples(CONTENT, CONTENT, CONTENT, CONTENT), system=st.none() | CONTENT)
def test_the_tokens_are_those_of_the_chat_template(family: str, contents: tuple[str, ...], system: str | None) -> None:
    # Llama 2's template strips system prompt and first content as one text, so that a blank content is refused.
    assume(system is None or not FAMILIES[family].trims or contents[0].strip())
    chat_tokenizer = tokenizer(family)
    messages = _conversation(*contents, system=system if FAMILIES[family].system else None)
    text = "".join(message["content"] for message in messages)
    spells = any(token in text for token in FAMILIES[family].special)
    ids, turns = _encode(chat_tokenizer, messages)
    assert ids == chat_tokenizer.apply_chat_template(messages, sanitize_control_tokens=spells)["input_ids"]
    assert len(turns) == 2
    for (start, replaceable, end), content in zip(turns, contents[1::2], strict=True):
        assert 0 < start <= replaceable <= end
        if FAMILIES[family].tokenizer == "byte_level":
            form = content.strip() if FAMILIES[family].trims else content
            learned = chat_tokenizer.decode(ids[start:end], skip_special_tokens=False)
            assert learned.endswith(form.lstrip("\n") + FAMILIES[family].closing)


BEFORE_LINE_ENDS = ["x <|im_end|>\n\nfoo", "a<|im_end|>\n", "<|im_end|>\n\n", "b.<|im_end|>\n\n\n<|im_start|>\n.\n\nc"]


@pytest.mark.parametrize("family", ["line ends that merge", "chatml"])
@pytest.mark.parametrize("content", BEFORE_LINE_ENDS)
def test_line_ends_after_a_special_token_that_a_content_spells_are_kept(family: str, content: str) -> None:
    chat_tokenizer = tokenizer(family)
    messages = _conversation(content, "y", "z", content)
    ids, turns = _encode(chat_tokenizer, messages)
    assert ids == chat_tokenizer.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
    assert chat_tokenizer.decode(ids) == chat_tokenizer.apply_chat_template(messages, tokenize=False)
    learned = [chat_tokenizer.decode(ids[start:replaceable]) for start, replaceable, _ in turns]
    assert learned == ["y", content]


def test_the_family_whose_line_ends_merge_has_tokens_of_several() -> None:
    ids, _ = _encode(tokenizer("line ends that merge"), _conversation("a\n\nb", "c.\n\nd"))
    assert {"ĊĊ", ".ĊĊ"} <= set(tokenizer("line ends that merge").convert_ids_to_tokens(ids))


@EVERY_FAMILY
def test_a_special_token_that_a_content_spells_is_text(family: str) -> None:
    chat_tokenizer, special = tokenizer(family), FAMILIES[family].special
    spelled = " ".join(special)
    plain, _ = _encode(chat_tokenizer, _conversation("x", "y"))
    ids, ((start, replaceable, _),) = _encode(chat_tokenizer, _conversation(f"a{spelled}b", f"c{spelled}d"))
    special_ids = set(chat_tokenizer.convert_tokens_to_ids(list(special)))
    assert sum(token in special_ids for token in ids) == sum(token in special_ids for token in plain)
    assert chat_tokenizer.decode(ids[start:replaceable]).strip() == f"c{spelled}d"


def test_a_content_may_hold_the_characters_that_contents_are_marked_with() -> None:
    messages = _conversation("\ue0f01\ue0f1", "\ue0f00\ue0f1\ue0f07\ue0f1")
    ids, ((start, replaceable, _),) = _encode(tokenizer("chatml"), messages)
    assert ids == tokenizer("chatml").apply_chat_template(messages)["input_ids"]
    assert tokenizer("chatml").decode(ids[start:replaceable]) == "\ue0f00\ue0f1\ue0f07\ue0f1"


def test_conversations_that_are_encoded_together_equal_each_alone() -> None:
    chats = [TWO_TURNS, _conversation("a", "b <|im_end|>"), _conversation("c" * 50, "d")]
    joint = list(
        ChatEncoder(tokenizer("chatml"), "all").encode([Conversation(messages=messages) for messages in chats])
    )
    assert joint == [_encode(tokenizer("chatml"), messages) for messages in chats]


def test_fields_beside_the_content_reach_the_template() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['name'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    messages: Messages = [message | {"name": "Ada"} for message in _conversation("a", "b")]
    ids, _ = _encode(_chatml(template), messages)
    assert _chatml().decode(ids) == "<|im_start|>Ada\na<|im_end|><|im_start|>Ada\nb<|im_end|>"


def test_tools_reach_the_template() -> None:
    template = "{% for tool in tools %}{{ tool['name'] }};{% endfor %}" + CHATML.strip()
    ids, _ = _encode(_chatml(template), _conversation("a", "b"), tools=[{"name": "add"}, {"name": "sub"}])
    assert _chatml().decode(ids).startswith("add;sub;<|im_start|>user")


TOOLS = [{"name": "add"}, {"name": "sub"}]


def test_a_template_that_ignores_the_tools_is_refused() -> None:
    assert "the chat template leaves out the tools" in _refusal(CHATML, _conversation("a", "b"), tools=TOOLS)


def test_settings_of_a_row_reach_the_template() -> None:
    template = "{% if think %}{{ think }}{% endif %}" + CHATML.strip()
    ids, _ = _encode(_chatml(template), _conversation("a", "b"), template_kwargs={"think": "hard;"})
    assert _chatml().decode(ids).startswith("hard;<|im_start|>user")
    plain, _ = _encode(_chatml(template), _conversation("a", "b"))
    assert _chatml().decode(plain).startswith("<|im_start|>user")


# --- turns ---


@EVERY_FAMILY
def test_a_turn_is_the_content_with_its_closing_tokens_and_the_content_is_replaceable(family: str) -> None:
    given_family, chat_tokenizer = FAMILIES[family], tokenizer(family)
    ids, turns = _encode(chat_tokenizer, TWO_TURNS)
    pieces = [(chat_tokenizer.decode(ids[a:b]), chat_tokenizer.decode(ids[b:c])) for a, b, c in turns]
    if given_family.tokenizer in {"metaspace", "prepending"}:  # the space before a word is in the word's token
        pieces = [(content.removeprefix(" "), closing) for content, closing in pieces]
    assert pieces == [("There are three.", given_family.closing), ("You are welcome.", given_family.closing)]


def test_a_closing_token_is_one_token_that_ends_the_turn() -> None:
    ids, turns = _encode(tokenizer("llama3"), TWO_TURNS)
    end_of_turn = tokenizer("llama3").convert_tokens_to_ids("<|eot_id|>")
    assert [ids[end - 1] for _, _, end in turns] == [end_of_turn] * 2
    assert [end - replaceable for _, replaceable, end in turns] == [1, 1]


@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_white_space_that_the_template_strips_is_in_no_turn(family: str) -> None:
    ids, ((start, _, end),) = _encode(tokenizer(family), _conversation("a", "\n There are three. \n"))
    assert tokenizer(family).decode(ids[start:end]) == "There are three." + FAMILIES[family].closing


@pytest.mark.parametrize(
    ("written", "learned"),
    [
        ("rstrip('\\n')", "\n\tThere are three. \t"),
        ("rstrip('\\t\\n')", "\n\tThere are three. "),
        ("lstrip('\\n')", "\tThere are three. \t\n"),
    ],
)
def test_white_space_may_be_stripped_in_part(written: str, learned: str) -> None:
    template = f"{{% for m in messages %}}<|im_start|>{{{{ m['content'].{written} }}}}<|im_end|>{{% endfor %}}"
    ids, ((start, replaceable, end),) = _encode(_chatml(template), _conversation("a", "\n\tThere are three. \t\n"))
    assert _chatml().decode(ids[start:replaceable]) == learned
    assert _chatml().decode(ids[replaceable:end]) == "<|im_end|>"


def test_text_that_a_template_writes_before_the_content_is_not_learned() -> None:
    ids, turns = _encode(tokenizer("qwen3"), TWO_TURNS)
    text = tokenizer("qwen3").decode(ids[: turns[-1][0]])
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_last_turn_that_the_template_does_not_close_ends_with_the_end_token() -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    ids, turns = _encode(_chatml(template), TWO_TURNS)
    learned = [(_chatml().decode(ids[a:b]).strip(), _chatml().decode(ids[b:c])) for a, b, c in turns]
    assert learned == [("There are three.", ""), ("You are welcome.", "<|im_end|>")]
    assert turns[-1][2] == len(ids)


def test_text_that_a_template_writes_after_a_content_is_written_by_the_assistant() -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + ' (end)<|im_end|>' }}{% endfor %}"
    ids, ((start, replaceable, end),) = _encode(_chatml(template), _conversation("x", "y"))
    assert (_chatml().decode(ids[start:replaceable]), _chatml().decode(ids[replaceable:end])) == (
        "y (end)",
        "<|im_end|>",
    )


def test_a_token_that_reaches_past_what_the_assistant_writes_is_not_replaceable() -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + 'e <|im_end|>' }}{% endfor %}"
    chat_tokenizer = _chatml(template)
    ids, ((start, replaceable, end),) = _encode(chat_tokenizer, _conversation("x", "the"))
    assert (chat_tokenizer.decode(ids[start:replaceable]), chat_tokenizer.decode(ids[replaceable:end])) == (
        "thee",
        " <|im_end|>",
    )


def test_the_last_turn_alone_may_be_learned() -> None:
    _, turns = _encode(tokenizer("chatml"), TWO_TURNS, "last")
    assert turns == _encode(tokenizer("chatml"), TWO_TURNS)[1][1:]


def test_turns_of_the_given_messages_are_not_learned() -> None:
    _, turns = _encode(tokenizer("chatml"), TWO_TURNS, unlearned=frozenset({1}))
    assert turns == _encode(tokenizer("chatml"), TWO_TURNS)[1][1:]


def test_the_system_message_may_go_into_a_later_turn() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *TWO_TURNS]
    ids, turns = _encode(tokenizer("mistral v3"), messages)
    text = tokenizer("mistral v3").decode(ids[turns[0][2] :])
    assert "Be brief.\n\nThank you!" in text
    assert [tokenizer("mistral v3").decode(ids[end - 1 : end]) for _, _, end in turns] == ["</s>", "</s>"]


# --- generation markers ---

MARKED = "chatml with generation markers"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(contents=st.tuples(CONTENT, CONTENT, CONTENT, CONTENT))
def test_turns_are_the_templates_generation_markers(contents: tuple[str, ...]) -> None:
    messages = _conversation(*(re.sub(r"<\|\w+\|>", "", content) or "x" for content in contents))
    ids, turns = _encode(tokenizer(MARKED), messages)
    mask = [0] * len(ids)
    for start, _, end in turns:
        mask[start:end] = [1] * (end - start)
    expected = tokenizer(MARKED).apply_chat_template(messages, return_assistant_tokens_mask=True)
    assert (ids, mask) == (expected["input_ids"], expected["assistant_masks"])


def test_markers_and_rendering_find_the_same_turns() -> None:
    assert _encode(tokenizer(MARKED), TWO_TURNS) == _encode(tokenizer("chatml"), TWO_TURNS)


WITH_HEADER = """
{%- for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}
{{- '<|im_start|>assistant\\n' + m['content'] + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"""


def test_a_header_and_text_after_the_closing_token_are_not_learned_inside_markers_either() -> None:
    assert _encode(_chatml(WITH_HEADER), TWO_TURNS) == _encode(tokenizer("chatml"), TWO_TURNS)


def test_markers_without_the_closing_token_are_the_same_as_with_it() -> None:
    template = CHATML_GENERATION.replace("{{- '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert template != CHATML_GENERATION
    assert _encode(_chatml(template), TWO_TURNS) == _encode(tokenizer("chatml"), TWO_TURNS)


def test_adjacent_markers_are_one_piece() -> None:
    template = CHATML_GENERATION.replace(
        "{{- '<|im_end|>' }}", "{% endgeneration %}{% generation %}{{- '<|im_end|>' }}"
    )
    assert template != CHATML_GENERATION
    assert _encode(_chatml(template), TWO_TURNS) == _encode(tokenizer("chatml"), TWO_TURNS)


CALLS: Messages = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 2}}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]


PLAIN_CALLS = """
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + (m['reasoning_content'] or '') }}
{{- (m['content'] or '') + (m['tool_calls'] | tojson if m['tool_calls'] else '') + '<|im_end|>\\n' }}{% endfor %}"""


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (CHATML_GENERATION, '<call>{"name": "add", "arguments": {"a": 1, "b": 2}}</call>'),
        (PLAIN_CALLS, '[{"name": "add", "arguments": {"a": 1, "b": 2}}]'),
    ],
    ids=["with markers", "without markers"],
)
def test_a_tool_call_is_learned_and_replaceable(template: str, call: str) -> None:
    ids, turns = _encode(_chatml(template), CALLS)
    pieces = [(_chatml().decode(ids[a:b]), _chatml().decode(ids[b:c])) for a, b, c in turns]
    assert pieces == [(call, "<|im_end|>"), ("It is 3.", "<|im_end|>")]


def test_a_template_that_swallows_a_tool_call_is_refused() -> None:
    template = CHATML_GENERATION.replace("m['tool_calls'] or []", "(m['tool_calls'] or [])[:0]")
    assert "leaves out tool call 1 of message 2" in _refusal(template, CALLS)
    text_beside = [CALLS[0], CALLS[1] | {"content": "Let me see."}, *CALLS[2:]]
    assert "takes no tool calls" in _refusal(CHATML, text_beside)
    second = CHATML_GENERATION.replace("m['tool_calls'] or []", "(m['tool_calls'] or [])[:1]")
    two = [CALLS[0], CALLS[1] | {"tool_calls": CALLS[1]["tool_calls"] * 2}, *CALLS[2:]]
    assert "leaves out tool call 2 of message 2" in _refusal(second, two)


def test_a_template_that_raises_without_a_tool_call_does_not_swallow_it() -> None:
    template = CHATML_GENERATION.replace(
        "{%- for call",
        "{%- if not m['content'] and not m['tool_calls'] %}{{ raise_exception('no') }}{% endif %}{% for call",
    )
    assert len(_encode(_chatml(template), CALLS)[1]) == 2


def test_reasoning_beside_the_content_is_learned_without_markers() -> None:
    messages = [TWO_TURNS[0], TWO_TURNS[1] | {"reasoning_content": "I see three."}]
    ids, ((start, replaceable, _),) = _encode(_chatml(PLAIN_CALLS), messages)
    assert _chatml().decode(ids[start:replaceable]) == "I see three.There are three."


REASONING = CHATML_GENERATION.replace(
    "{%- if m['content'] %}", "{{- m['reasoning_content'] if loop.last }}{%- if m['content'] %}"
)


def test_reasoning_of_the_last_message_that_the_template_ignores_is_refused() -> None:
    messages = [*TWO_TURNS[:3], TWO_TURNS[3] | {"reasoning_content": "They are polite."}]
    assert "leaves out the reasoning of message 4" in _refusal(CHATML_GENERATION, messages)
    ids, turns = _encode(_chatml(REASONING), messages)
    assert [_chatml().decode(ids[start:end]) for start, end, _ in turns] == [
        "There are three.",
        "They are polite.You are welcome.",
    ]


def test_reasoning_of_earlier_turns_may_be_left_out() -> None:
    messages = [TWO_TURNS[0], TWO_TURNS[1] | {"reasoning_content": "I see three."}, *TWO_TURNS[2:]]
    assert _encode(_chatml(REASONING), messages) == _encode(_chatml(REASONING), TWO_TURNS)


def test_a_tool_call_in_a_turn_that_is_not_learned_needs_no_markers() -> None:
    ids, turns = _encode(_chatml(PLAIN_CALLS), CALLS, "last")
    assert [_chatml().decode(ids[start:end]) for start, _, end in turns] == ["It is 3.<|im_end|>"]
    assert '[{"name": "add"' in _chatml().decode(ids)
    assert _encode(_chatml(PLAIN_CALLS), CALLS, unlearned=frozenset({1})) == (ids, turns)


def test_markers_that_do_not_mark_every_turn_are_refused() -> None:
    template = CHATML_GENERATION.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last")
    assert "message 2: the chat template's generation markers do not enclose it" in _refusal(template)


def test_markers_around_something_else_are_refused() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>{% endfor %}"
    )
    assert "message 2: the chat template's generation markers do not enclose it" in _refusal(template)


# --- templates that are refused ---


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{{ m['content'] | upper }}", "does not reproduce the messages"),
        ("{{ m['content'][:5] }}", "does not reproduce the messages"),
        ("{{ m['content'] + m['content'] }}", "does not reproduce the messages"),
        ("{{ 'x' if 'three' in m['content'] else m['content'] }}", "does not reproduce the messages"),
        ("{% if loop.index != 2 %}{{ m['content'] }}{% endif %}", "leaves out the content of message 2"),
        ("{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}", "leaves out the content of message 1"),
        ("{{ raise_exception('no such\nrole') }}", "the chat template raises: no such role"),
        ("{{ 1 / 0 }}", "the chat template raises"),
        ("{{ m['content']", "the chat template raises"),
    ],
)
def test_a_template_that_does_not_reproduce_the_messages_is_refused_with_the_row(content: str, expected: str) -> None:
    messages = _conversation('a "few" apples\n?', "There are three.", "Thank you!", "You are welcome.")
    template = f"{{% for m in messages %}}<|im_start|>{content}<|im_end|>\n{{% endfor %}}"
    assert expected in _refusal(template, messages)


def test_text_that_a_template_writes_after_the_last_content_may_not_depend_on_contents() -> None:
    assert "does not reproduce" in _refusal(CHATML + "{{ 'Bye.' if 'apples' in messages[0]['content'] }}")


def test_a_template_that_swallows_a_turn_of_some_rows_is_refused_for_those_rows_only() -> None:
    template = "{% for m in messages[-2:] %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    assert "leaves out the content of message 1" in _refusal(template)
    assert len(_encode(_chatml(template), TWO_TURNS[2:])[1]) == 1


def test_a_template_that_refuses_a_system_message_says_so_with_the_row() -> None:
    with pytest.raises(InputError, match=r"line 7: the chat template raises: System role not supported"):
        _encode(tokenizer("gemma"), [{"role": "system", "content": "x"}, *TWO_TURNS])


def test_half_a_surrogate_pair_in_a_field_that_the_template_writes_is_refused() -> None:
    template = "{% for m in messages %}{{ m['name'] + m['content'] }}<|im_end|>{% endfor %}"
    messages: Messages = [message | {"name": "\ud83d"} for message in TWO_TURNS]
    assert "half a surrogate pair" in _refusal(template, messages)


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"^model\.tokenizer: conversations, and two texts with data.as_chat, need a tokenizer with a chat",
    ):
        ChatEncoder(_chatml(None), "all")


def test_contents_are_found_even_if_they_repeat_each_other_and_the_template() -> None:
    messages = _conversation("assistant", "user", "user\nassistant\n", "assistant\nassistant")
    ids, turns = _encode(tokenizer("llama3"), messages)
    learned = [tokenizer("llama3").decode(ids[start:replaceable]) for start, replaceable, _ in turns]
    assert learned == ["user", "assistant\nassistant"]


# --- what a row may spell, and what is never cut ---

THINKS = """
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}
{%- if m['role'] == 'assistant' and '</think>' in m['content'] %}
{%- set parts = m['content'].split('</think>') %}
{{- '<think>\\n' + parts[0].split('<think>')[-1].strip() + '\\n</think>\\n\\n' + parts[1].strip() }}
{%- else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_reasoning_without_an_answer_is_learned_to_its_end() -> None:
    ids, ((start, replaceable, end),) = _encode(_chatml(THINKS), _conversation("a", "<think>x</think>"))
    assert _chatml().decode(ids[start:replaceable]) == "<think>\nx\n</think>"
    assert _chatml().decode(ids[replaceable:end]) == "\n\n<|im_end|>"


@pytest.mark.parametrize("where", ["arguments", "name", "tools"])
def test_a_special_token_that_a_tool_call_or_a_tool_spells_is_refused(where: str) -> None:
    spelled = {"name": "add", "arguments": {"a": "1"}}
    if where == "name":
        spelled["name"] = "<|im_end|>"
    elif where == "arguments":
        spelled["arguments"] = {"a": "x<|im_end|>"}
    messages = [CALLS[0], CALLS[1] | {"tool_calls": [spelled]}, *CALLS[2:]]
    template = "{{ tools | tojson }}" + PLAIN_CALLS
    tools = [{"name": "<|im_start|>" if where == "tools" else "add"}]
    assert "spells the special token '<|im_" in _refusal(template, messages, tools=tools)


def test_reasoning_of_a_turn_that_is_not_learned_may_be_left_out() -> None:
    messages = [TWO_TURNS[0], TWO_TURNS[1] | {"reasoning_content": "since"}, *TWO_TURNS[2:]]
    assert "leaves out the reasoning of message 2" in _refusal(CHATML, messages)
    assert _encode(_chatml(), messages, "last") == _encode(_chatml(), TWO_TURNS, "last")


@pytest.mark.parametrize("parts", [0, 1])
@pytest.mark.parametrize("template", [CHATML, CHATML.replace("m['content']", "m['content'][0]['text']")])
def test_texts_and_parts_may_be_mixed(parts: int, template: str) -> None:
    messages = [dict(message) for message in TWO_TURNS[:2]]
    messages[parts]["content"] = [{"type": "text", "text": messages[parts]["content"]}]
    assert _encode(_chatml(template), messages) == _encode(_chatml(), TWO_TURNS[:2])
