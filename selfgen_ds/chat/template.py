"""A tokenizer's chat template: the texts that it makes of conversations, and the special tokens in them."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.errors import InputError

Span = tuple[int, int]
"""Start and end of a piece of text, in characters."""
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can express a lone surrogate, UTF-8 cannot
RAISES = "the chat template raises"
_DATE = "strftime_now"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def asks_for_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the texts of a tokenizer's chat template depend on the day."""
    return _DATE in str(tokenizer.chat_template)


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        date: The day, such as `2026-01-31`, that the template is told if it asks for the date; None for today.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._day = None if date is None else datetime.datetime.fromisoformat(date)
        special = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len)
        spelled = "|".join(map(re.escape, reversed(special))) or "(?!)"
        self._source = str(tokenizer.chat_template)
        self.knows_generation_prompt = "add_generation_prompt" in self._source
        """Whether the template can write what comes before an answer without the answer."""
        self.knows_tool_calls = "tool_calls" in self._source
        self.special = re.compile(spelled)
        """Finds every special token."""
        self.closing = re.compile(rf"\s*(?:{spelled})")
        """Matches a special token, and white space before it."""
        self.closing_run = re.compile(rf"\s*(?:{spelled})+")
        """Finds special tokens that follow each other, and white space before them."""

    def known(self, choices: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return those of some sets of variables whose names stand in the template; others have no effect on it."""
        return [variables for variables in choices if all(name in self._source for name in variables)]

    def text(self, chat: Conversation, generation_prompt: bool = False, **variables: Any) -> str:
        """Return the text of a conversation.

        Args:
            generation_prompt: Whether the text ends with what the template writes before the model's answer.
            variables: Given to the template, beside those of the conversation.

        Raises:
            InputError: The template raises. The message names the row.
        """
        return self._apply(chat, generation_prompt, mark=False, **variables)[0]

    def text_or_none(self, chat: Conversation, generation_prompt: bool = False, **variables: Any) -> str | None:
        """Return the text of a conversation, or None if the template raises."""
        try:
            return self.text(chat, generation_prompt, **variables)
        except InputError:
            return None

    def text_and_generated(self, chat: Conversation) -> tuple[str, list[Span] | None]:
        """Return the text of a conversation, and what is inside the template's generation markers, if it has any.

        Raises:
            InputError: The template raises. The message names the row.
        """
        return self._apply(chat, generation_prompt=False, mark=True)

    def _apply(
        self, chat: Conversation, generation_prompt: bool, mark: bool, **variables: Any
    ) -> tuple[str, list[Span] | None]:
        try:
            template = self._tokenizer.get_chat_template(tools=chat.tools)
            if self._day is not None:  # transformers keeps the compiled template, whose global this is
                _compile_jinja_template(template).globals[_DATE] = self._day.strftime
            mark = mark and _GENERATION.search(template) is not None
            texts, generated = render_jinja_template(
                [chat.messages],
                tools=chat.tools,
                chat_template=template,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=mark,
                **self._tokenizer.special_tokens_map | chat.template_kwargs | variables,
            )
        except Exception as error:  # a template can raise anything
            raise InputError(f"{chat.where}: {RAISES}: {' '.join(str(error).split())}") from error
        if not texts[0].isascii() and SURROGATE.search(texts[0]):
            raise InputError(f"{chat.where}: expected UTF-8 text, got half a surrogate pair")
        return texts[0], generated[0] if mark else None
