"""Encoding of conversations with the tokenizer's chat template.

The token ids equal those of `tokenizer.apply_chat_template(messages)`, with the messages in a form that the template
takes, or, if a message spells a special token, those of `apply_chat_template(messages, sanitize_control_tokens=True)`.
If nothing in the text closes the last turn, the end token follows.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import pairwise
from operator import itemgetter

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from selfgen_ds.chat.conversation import Conversation, forms
from selfgen_ds.chat.template import RAISES, ChatTemplate
from selfgen_ds.chat.turns import Rendered, render
from selfgen_ds.errors import InputError

Encoded = tuple[list[int], list[list[int]]]
"""The token ids of a row and its turns. A turn is `[start, end of the replaceable part, end]`, in tokens."""


class ChatEncoder:
    """Encoder of conversations with a tokenizer's chat template.

    Args:
        assistant_turns: Which of the assistant's turns are learned: `all` or `last`.
        date: The day, such as `2026-01-31`, that the template is told if it asks for the date; None for today.
        end_ids: Tokens that the model's generation configuration names as ends of an answer. One of them, or the
            tokenizer's end token, ends a last turn that nothing closes.

    Raises:
        InputError: The tokenizer has no chat template, or gives no character offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        assistant_turns: str,
        date: str | None = None,
        end_ids: tuple[int, ...] = (),
    ) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                "model.tokenizer: conversations, and two texts with data.as_chat, need a tokenizer with a chat "
                "template (`chat_template.jinja`), or model.chat_template"
            )
        if not tokenizer.is_fast:
            raise InputError("model.tokenizer: conversations need a fast tokenizer (of the library `tokenizers`)")
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, date)
        self._end_id = end_ids[0] if end_ids and tokenizer.eos_token_id not in end_ids else tokenizer.eos_token_id
        self._last_only = assistant_turns == "last"
        self._form = 0  # that of the last row, because rows of a source are mostly alike

    def render(self, chat: Conversation) -> Rendered:
        """Return the text of a conversation in the first form that the template takes, and its turns.

        Raises:
            InputError: The template takes no form. The message names the row, and says why not the one that it has.
        """
        problems: dict[int, InputError] = {}
        for form, candidate in forms(self._form, chat):
            try:
                rendered = render(self._template, candidate, self._last_only)
            except InputError as error:
                problems[form] = error
            else:
                self._form = form
                return rendered
        if any(message.get("tool_calls") for message in chat.messages) and not self._template.knows_tool_calls:
            advice = "one of your own can (model.chat_template)"
            raise InputError(f"{chat.where}: the chat template takes no tool calls; {advice}")
        raise max((problems[form] for form in sorted(problems)), key=_helpfulness)

    def tokenize(self, rows: list[Rendered]) -> Iterator[Encoded]:
        """Yield the token ids and turns of rendered conversations."""
        texts = [row.text for row in rows]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for row, ids, offsets in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if spelled := [m.span() for span in row.contents for m in self._template.special.finditer(row.text, *span)]:
                ids, offsets = self._encode_with_plain(row.text, spelled)
            turns = [_tokens_of(turn, offsets) for turn in row.turns]
            if not row.closed:
                end = turns[-1][2]
                ids, turns = [*ids[:end], self._end_id], [*turns[:-1], [*turns[-1][:2], end + 1]]
            yield ids, turns

    def encode(self, conversations: list[Conversation]) -> list[Encoded]:
        """Return the token ids and turns of conversations.

        Raises:
            InputError: As `render`.
        """
        return list(self.tokenize([self.render(chat) for chat in conversations]))

    def between_answers(self, request: str, setting: str) -> tuple[list[int], list[int]]:
        """Return the tokens that close an assistant's turn, and the tokens from there to the content of the next turn.

        Args:
            request: The content of the user's turn between the two turns.
            setting: The name of the setting that gave the request, for errors.

        Raises:
            InputError: The template raises, or does not reproduce the request, or does not accept an empty request.
        """

        def exchange(content: str) -> Conversation:
            contents = {"user": "What is it?", "assistant": "This is the answer"}
            messages = [{"role": role, "content": contents[role]} for role in ("user", "assistant") * 2]
            messages[2]["content"] = content
            return Conversation(
                messages=messages, where=f"{setting}, as message 3 of question, answer, cue, correction"
            )

        chat = exchange(request)
        if not request:  # an empty content cannot be found in the text, so `render` does not check it
            marked = exchange(mark := "\ue0f0")
            if self._template.text(marked).replace(mark, "") != self._template.text(chat):
                raise InputError(f"{setting}: the chat template takes no empty turn of the user")
        ((ids, turns),) = self.encode([chat])
        # A turn without a replaceable part is text that the template generates before a content.
        (_, content_end, end), (start, _, _) = [turn for turn in turns if turn[0] < turn[1]]
        return ids[content_end:end], ids[end:start]

    def _encode_with_plain(self, text: str, spelled: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids and offsets of a text in which the special tokens at the spans `spelled` are plain text."""
        line_end = self._tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        edges = [0, *(edge for span in spelled for edge in span), len(text)]
        for number, (start, end) in enumerate(pairwise(edges)):
            if start == end:
                continue
            # Some tokenizers put a space before the start of a text. A newline before the piece prevents that, unless
            # the newline becomes one token with the text after it.
            for lead in ("\n", "") if number else ("",):
                piece = self._tokenizer(
                    lead + text[start:end],
                    add_special_tokens=False,
                    split_special_tokens=number % 2 == 1,
                    return_offsets_mapping=True,
                )
                skipped = len(line_end) if lead else 0
                if piece["input_ids"][:skipped] == line_end[:skipped]:
                    break
            ids += piece["input_ids"][skipped:]
            shift = start - len(lead)
            offsets += [(first + shift, last + shift) for first, last in piece["offset_mapping"][skipped:]]
        return ids, offsets


def _helpfulness(problem: InputError) -> int:
    """Rank why a template does not take a form of a row: a form that gets further says more of what is wrong."""
    if RAISES in str(problem):
        return int(isinstance(problem.__cause__, TemplateError))  # the template's own words, or an error of Python's
    return 2 if "leaves out the content" in str(problem) else 3


def _tokens_of(turn: tuple[int, int, int], offsets: list[tuple[int, int]]) -> list[int]:
    """Convert a turn from characters to tokens. A token that extends past the content is not replaceable."""
    start, content_end, end = turn
    first = bisect_right(offsets, start, key=itemgetter(1))
    last = bisect_left(offsets, end, lo=first, key=itemgetter(0))
    replaceable = bisect_right(offsets, content_end, lo=first, key=itemgetter(1))
    return [first, min(replaceable, last), last]
