"""The turns of the assistant in the text that a chat template makes of a conversation, in characters.

A turn is what generation would have to produce at its place. It starts where the text ends that the template gives to a
model that is to answer (the generation prompt), and after an empty block of reasoning, which templates write by
themselves. It ends with the special tokens that close it: those that the template writes after the message whether or
not others follow. Some templates close a turn by the next message's opening. If the template has `{% generation %}`
markers, only what they enclose is learned, and the closing tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from selfgen_ds.chat.contents import (
    THOUGHT,
    Contents,
    check_other_fields,
    common_end,
    common_start,
    header_of_answer,
    locate,
    other_message,
    other_name,
    tail_after_contents,
    texts_of,
)
from selfgen_ds.chat.conversation import Conversation, change_calls
from selfgen_ds.chat.template import ChatTemplate, Span
from selfgen_ds.errors import InputError

_LAST_ALONE = "; data.assistant_turns: last learns the last turn alone"
_EMPTY_THOUGHT = re.compile(r"\s*(?:(?:<think>|\[THINK\])\s*)?(?:</think>|\[/THINK\])\s*")
_PROMPTS: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False})
"""Variables with which templates write the generation prompt: that of an answer with reasoning, and those without."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The text of a conversation. Positions count characters, and spans come in the order of the text."""

    text: str
    contents: list[Span]
    """The contents and the reasoning of all messages."""
    turns: list[tuple[int, int, int]]
    """Start, end of the replaceable part, and end of each learned piece of a turn."""
    closed: bool
    """Whether nothing has to be added to the last turn so that it ends: it is not the last message, or it is closed."""
    unlike_inference: str
    """What the template shows otherwise than at inference, in the first learned turn of which this is true."""


def render(template: ChatTemplate, chat: Conversation, last_only: bool) -> Rendered:
    """Return the text of a conversation and its turns.

    Args:
        last_only: Whether only the last turn is learned.

    Raises:
        InputError: The template raises, or does not show what the messages hold. The message names the row.
    """
    text, generated = template.text_and_generated(chat)
    learned = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i not in chat.unlearned]
    learned = learned[-1:] if last_only else learned
    split = False
    try:
        contents = locate(template, chat, text, learned, split)
    except InputError:
        if not any(THOUGHT.match(part) for message in chat.messages for part in texts_of(message)):
            raise
        split = True
        contents = locate(template, chat, text, learned, split)
    check_other_fields(template, chat, text)
    pieces: list[tuple[int, int, int]] = []
    unlike_inference = ""
    for i in learned:
        turn = _Turn(template, chat, text, contents, i, split)
        of_turn = turn.pieces(generated)
        if pieces and of_turn[0][0] < pieces[-1][2]:
            raise InputError(f"{chat.where}: the chat template writes the answers into each other")
        pieces += of_turn
        unlike_inference = unlike_inference or turn.unlike_inference()
    closed = turn.closed or learned[-1] < len(chat.messages) - 1
    if not closed and text[pieces[-1][2] :].strip():
        raise InputError(f"{chat.where}: no special token closes the last turn, and text follows it")
    return Rendered(
        text=text,
        contents=sorted(span for _, span in contents.shown),
        turns=pieces,
        closed=closed,
        unlike_inference=unlike_inference,
    )


class _Turn:
    """A learned turn of the assistant in the text of a conversation.

    Args:
        index: The index of the turn's message.
        split: Whether reasoning inside of contents is a part of its own.
    """

    def __init__(
        self, template: ChatTemplate, chat: Conversation, text: str, contents: Contents, index: int, split: bool
    ) -> None:
        self._template, self._chat, self._text, self._index, self._split = template, chat, text, index, split
        self._message = chat.messages[index]
        self._before = chat.until(index)
        self._where = f"{chat.where}, message {index + 1}"
        self._own = contents.of(index)
        self._differences = [
            "the text does not show all of it, because messages follow" + _LAST_ALONE
        ] * contents.hides(index)
        self._overlap = 0  # characters at the end of the message that another message in its place also has there
        self._prompts: list[str | None] = []  # of the first of `_PROMPTS` that the template knows
        self._header = ""  # what a template without a generation prompt writes before the answer
        generated = self._as_generated()
        self._first, self._last = self._written() if generated is None else generated[:2]
        others = [span for number, span in contents.shown if contents.parts[number].message != index]
        if any(self._first < start < self._last for start, _ in others):
            raise InputError(f"{self._where}: the chat template writes another message in the midst of it")
        self._floor = max((end for _, end in others if end <= self._first), default=0)
        self._ceiling = min((start for start, _ in others if start >= self._last), default=len(text))
        if generated is None:
            self._start = self._find_start()
            self._content_end, self._end = self._find_closing()
        else:
            self._start, self._content_end, self._end = generated
        self.closed = self._content_end < self._end
        """Whether a special token closes the turn."""

    def pieces(self, generated: list[Span] | None) -> list[tuple[int, int, int]]:
        """Return the learned pieces of the turn: start, end of the replaceable part, and end.

        Args:
            generated: The spans inside the template's generation markers, if it has any.

        Raises:
            InputError: The markers leave out a part of the message, or nothing shows where the turn starts.
        """
        if generated is None:
            if self._start is None:
                raise InputError(f"{self._where}: the text does not show where the answer starts")
            return [(self._start, self._content_end, self._end)]
        from_start = 0 if self._start is None else self._start
        inside = [
            (max(start, from_start), end)
            for start, end in generated
            if start < self._ceiling and from_start < end and self._floor <= start
        ]
        own = [(max(start, from_start), end) for start, end in self._own or [(self._first, self._last)]]
        if not inside or any(not _covered(span, inside) for span in own):
            raise InputError(f"{self._where}: the chat template's generation markers do not enclose it")
        pieces = [(start, min(end, max(start, self._content_end)), end) for start, end in _joined(inside)]
        start, middle, end = pieces[-1]
        return [*pieces[:-1], (start, middle, self._end if end >= self._content_end else end)]

    def unlike_inference(self) -> str:
        """Return what the template shows otherwise than at inference; nothing if it shows the same."""
        return f"{self._where}: {self._differences[0]}" if self._differences else ""

    def _as_generated(self) -> tuple[int, int, int] | None:
        """Return the turn, if the text goes on from what a model is given as it does where this message is the last.

        This is true of most templates, and spares the search for what the text says of the message. None if it is not,
        or if no special token closes the message there, or other text follows those that close a tool call.
        """
        first, last = (self._own[0][0], self._own[-1][1]) if self._own else (len(self._text),) * 2
        prompt_end = self._after_prompt(0, first, last) if self._template.knows_generation_prompt else None
        answered = self._text_until_answer
        if prompt_end is None or answered is None or not answered.startswith(self._text[:prompt_end]):
            return None
        start = self._after_empty_thought(self._text, prompt_end, first)
        shift = self._after_empty_thought(answered, prompt_end, len(answered)) - start
        runs = list(self._template.closing_run.finditer(answered, shift + (last if self._own else start)))
        called = bool(self._message.get("tool_calls"))
        if not runs or (called and answered[runs[-1].end() :].strip()):
            return None
        content_end, end = runs[-1 if called else 0].span()
        if not self._text.startswith(answered[start + shift : end], start):
            return None
        return start, content_end - shift, end - shift

    @cached_property
    def _text_until_answer(self) -> str | None:
        """The text of the conversation until this turn; None if the template raises."""
        whole = self._index + 1 == len(self._chat.messages)
        return self._text if whole else self._template.text_or_none(self._chat.until(self._index + 1))

    def _written(self) -> Span:
        """Return where the text starts and ends to depend on the message.

        Raises:
            InputError: Nothing shows this, because the template raises if the message has another content.
        """
        other = self._template.text_or_none(self._with_other_texts(self._chat))
        spans = list(self._own)
        if other is not None:
            spans.append((common_start(self._text, other), len(self._text) - common_end(self._text, other)))
            self._overlap = max(end for _, end in spans) - spans[-1][1]
        if self._message.get("tool_calls"):
            renamed = self._chat.with_message(self._index, change_calls(self._message, other_name))
            if (other := self._template.text_or_none(renamed)) not in (None, self._text):
                start = common_start(self._text, other)
                spans.append((start, start))
        if not spans:
            raise InputError(f"{self._where}: the text does not show where it is")
        return min(start for start, _ in spans), max(end for _, end in spans)

    def _with_other_texts(self, chat: Conversation) -> Conversation:
        return chat.with_message(self._index, other_message(self._message, self._index, self._split))

    def _find_start(self) -> int | None:
        """Return the end of the generation prompt, or of an empty block of reasoning after it; None if it is unknown.

        Tried in this order: what a model is given at inference, with or without reasoning, starts the text; or what
        it is given after the last content stands in the text after that content, in whole or but for an opened block of
        reasoning, as with templates that move the tools to the last message; or the turn starts with its content.
        """
        start = self._after_prompt(self._floor, self._first, self._last)
        if start is None:
            start = self._after_contents()
        if start is None:
            self._differences.append("the template does not say what a model is given before it")
            starts_with_text = bool(self._own) and self._first == self._own[0][0]
            return self._first if starts_with_text else None
        return self._after_empty_thought(self._text, start, self._first)

    @staticmethod
    def _after_empty_thought(text: str, start: int, first: int) -> int:
        """Return the end of an empty block of reasoning between a start and the message, or the start without one."""
        empty = _EMPTY_THOUGHT.match(text, start, max(start, first))
        return empty.end() if empty else start

    def _after_prompt(self, floor: int, first: int, last: int) -> int | None:
        """Return the end of a generation prompt that starts the text, or None.

        If more than white space lies between it and the message, a prompt without reasoning may be longer. A prompt may
        end inside of the content, which may open with the tag that the prompt ends with.

        Args:
            floor: The first position at which it may end.
            first: The start of the message.
            last: The end of the message, before which it has to end.
        """
        longest = None
        for number, variables in enumerate(self._template.known(_PROMPTS)):
            if number == len(self._prompts):
                self._prompts.append(self._template.text_or_none(self._before, True, **variables))
            prompt = self._prompts[number]
            if prompt is None:
                continue
            if not self._template.knows_generation_prompt:
                self._header = header_of_answer(self._template, self._before, prompt)
                prompt += self._header
            fits = floor <= len(prompt) < max(last, first + 1) and self._text.startswith(prompt)
            longest = max(longest or 0, len(prompt)) if fits else longest
            if not self._template.knows_generation_prompt or (
                longest is not None and not self._text[longest:first].strip()
            ):
                break
        if self._header:
            self._differences.append("the template writes no generation prompt, but a header before the answer")
        return longest

    def _after_contents(self) -> int | None:
        """Return where a generation prompt ends that follows the last content before the turn, or None."""
        tails = [
            tail_after_contents(self._template, self._before, **variables)
            for variables in self._template.known(_PROMPTS)
        ]
        before = self._text[self._floor : self._first]
        for tail in tails:
            if tail is not None and (whole := tail + self._header) and before.startswith(whole):
                self._differences.append(
                    "the messages before it look otherwise than when it is generated" + _LAST_ALONE
                )
                return self._floor + len(whole)
        if not self._template.knows_generation_prompt and not self._header:
            return None
        opening = self._opening()
        if opening and (position := self._text.rfind(opening, self._floor, self._first)) >= 0:
            self._differences.append("what stands before its opening looks otherwise than when it is generated")
            return position + len(opening)
        for tail in tails:
            whole = "" if tail is None else tail + self._header
            shared = whole[: self._whole(whole, common_start(whole, before))]
            if shared.strip():
                self._differences.append("a part of what a model is given before it, such as `<think>`, is not shown")
                return self._floor + len(shared)
        return None

    def _opening(self) -> str:
        """Return what the generation prompt adds to the messages before the turn."""
        without, prompt = (self._template.text_or_none(self._before, adds) or "" for adds in (False, True))
        return prompt[len(without) :] if prompt.startswith(without) else self._header

    def _whole(self, text: str, end: int) -> int:
        """Return the last position up to `end` at which a line, a word or a special token of a text ends."""
        ends = [match.end() for match in self._template.special.finditer(text)]
        ends += [match.end() for match in re.finditer(r"\s+", text)]
        return max((position for position in ends if position <= end), default=0)

    def _find_closing(self) -> Span:
        """Return where the special tokens that close the turn start, and where they end; twice the same without any.

        They are the last ones that the template writes after the message both as the last one and in this text. If it
        writes none after a last message, the opening of the next message closes the turn. If it writes other ones
        there, those of this text are not what generation has to produce, and are not learned.
        """
        shown = self._text[self._last : self._ceiling]
        alone = self._alone_after()
        if alone is None:
            return self._closing_in(shown, first=True) or (self._last, self._last)
        common = shown[: self._whole_tokens(shown, common_start(shown, alone))]
        if found := self._closing_in(common, first=not self._message.get("tool_calls")):
            return found
        end = self._last + len(common.rstrip())
        if self._template.special.search(alone):
            self._differences.append("it ends otherwise than when no message follows" + _LAST_ALONE)
            return end, end
        opening = self._template.closing.match(self._text, end, self._ceiling)
        return (end, opening.end()) if opening else (end, end)

    def _alone_after(self) -> str | None:
        """Return what the template writes after the message if none follows; None if it raises."""
        text = self._text_until_answer
        if text is None or text.startswith(self._text[: self._last]):
            return None if text is None else text[self._last :]
        other = self._template.text_or_none(self._with_other_texts(self._chat.until(self._index + 1)))
        return None if other is None else text[len(text) - common_end(text, other) + self._overlap :]

    def _whole_tokens(self, text: str, end: int) -> int:
        """Return a position up to `end` at which no special token of a text is cut."""
        return min((m.start() for m in self._template.special.finditer(text) if m.start() < end < m.end()), default=end)

    def _closing_in(self, after: str, first: bool) -> Span | None:
        """Return the span of the special tokens, with white space before them, that close the turn; None without any.

        Args:
            after: The text after the message.
            first: Whether the first of these tokens count, or the last ones. The text after a tool call may hold
                others.
        """
        runs = list(self._template.closing_run.finditer(after))
        if not runs:
            return None
        run = runs[0 if first else -1]
        return self._last + run.start(), self._last + run.end()


def _joined(spans: list[Span]) -> list[Span]:
    """Join spans that touch each other."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _covered(span: Span, by: list[Span]) -> bool:
    """Return whether one of some spans, joined where they touch, holds a whole span."""
    return any(start <= span[0] and span[1] <= end for start, end in _joined(by))
