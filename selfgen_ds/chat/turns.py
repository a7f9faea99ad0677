"""The turns of the assistant in the text that a chat template makes of a conversation, in characters.

A turn is what generation would have to produce at its place. It starts where the text ends that the template gives to a
model that is to answer (the generation prompt), and after an empty block of reasoning, which templates write by
themselves. It ends with the special tokens that close it: those that the template writes after the message whether or
not others follow. Some templates close a turn by the next message's opening. If the template has `{% generation %}`
markers, only what they enclose is learned, and the closing tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from selfgen_ds.chat.contents import (
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
_PROMPTS: tuple[dict[str, Any], ...] = (
    {},
    *({name: thinks} for thinks in (False, True) for name in ("enable_thinking", "thinking")),
)
"""Variables with which templates write the generation prompts of answers with and without reasoning."""


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
    asked_with: dict[str, Any]
    """Variables with which the template writes the generation prompt that stands before the last learned turn; none if
    it writes it so by default."""


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
    contents = locate(template, chat, text, learned)
    check_other_fields(template, chat, text)
    pieces: list[tuple[int, int, int]] = []
    differences = []
    for i in learned:
        finder = _Finder(template, chat, text, contents, i)
        turn = finder.find(has_markers=generated is not None)
        pieces += _pieces(turn, generated, finder.where)
        if turn.difference:
            differences.append(f"{finder.where}: {turn.difference}")
    edges = [edge for piece in pieces for edge in piece]
    if edges != sorted(edges):
        raise InputError(f"{chat.where}: the chat template writes the answers into each other")
    closed = turn.content_end < turn.end or learned[-1] < len(chat.messages) - 1
    if not closed and text[pieces[-1][2] :].strip():
        raise InputError(f"{chat.where}: no special token closes the last turn, and text follows it")
    return Rendered(
        text=text,
        contents=sorted(span for _, span in contents.shown),
        turns=pieces,
        closed=closed,
        unlike_inference=next(iter(differences), ""),
        asked_with=turn.asked_with,
    )


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the text depends on a message."""

    first: int
    last: int
    overlap: int = 0
    """Characters before `last` that the text has there whatever the message says, such as the `}` that ends a call."""
    floor: int = 0
    """End of the last content of another message before it."""
    ceiling: int = 0
    """Start of the first content of another message after it."""


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """A turn of the assistant in the text."""

    start: int | None
    """None if nothing shows where it starts."""
    content_end: int
    """Where the special tokens that close it start; without any, where it ends."""
    end: int
    own: list[Span]
    """The contents of its message; without any, where the text depends on the message."""
    floor: int
    """End of the last content of another message before it."""
    difference: str
    """What the template shows otherwise than at inference; empty if it shows the same."""
    asked_with: dict[str, Any]
    """Variables of the generation prompt before it."""


def _pieces(turn: _Turn, generated: list[Span] | None, where: str) -> list[tuple[int, int, int]]:
    """Return the learned pieces of a turn: start, end of the replaceable part, and end.

    Args:
        generated: The spans inside the template's generation markers, if it has any.

    Raises:
        InputError: The markers leave out a part of the message, or nothing shows where the turn starts.
    """
    if generated is None:
        if turn.start is None:
            raise InputError(f"{where}: the text does not show where the answer starts")
        return [(turn.start, turn.content_end, turn.end)]
    from_start = turn.start or 0
    until = max(turn.end, turn.own[-1][1])
    inside = [
        (max(start, from_start), end)
        for start, end in generated
        if start < until and from_start < end and turn.floor <= start
    ]
    own = [(max(start, from_start), end) for start, end in turn.own]
    if not inside or any(not _covered(span, inside) for span in own):
        raise InputError(f"{where}: the chat template's generation markers do not enclose it")
    pieces = [(start, min(end, max(start, turn.content_end)), end) for start, end in _joined(inside)]
    start, middle, end = pieces[-1]
    return [*pieces[:-1], (start, middle, turn.end if end >= turn.content_end else end)]


class _Finder:
    """Finds a learned turn of the assistant in the text of a conversation.

    Args:
        index: The index of the turn's message.
    """

    def __init__(self, template: ChatTemplate, chat: Conversation, text: str, contents: Contents, index: int) -> None:
        self.where = f"{chat.where}, message {index + 1}"
        self._template, self._chat, self._text, self._contents, self._index = template, chat, text, contents, index
        self._message = chat.messages[index]
        self._called = bool(self._message.get("tool_calls"))
        self._before = chat.until(index)
        self._own = contents.of(index)
        self._others = [span for number, span in contents.shown if contents.parts[number].message != index]
        self._prompts_so_far: list[str | None] = []
        self._asked_with: dict[str, Any] = {}

    def find(self, has_markers: bool) -> _Turn:
        """Return the turn.

        Args:
            has_markers: Whether the template has generation markers, for which a call's place has to be known.

        Raises:
            InputError: The text does not show where it is, or shows another message inside of it.
        """
        hidden = "the text does not show all of it, because messages follow" + _LAST_ALONE
        difference = hidden if self._contents.hides(self._index) else ""
        found = None if has_markers and not self._own else self._as_generated()
        if found is not None:
            start, content_end, end = found
            floor = max((other for _, other in self._others if other <= start), default=0)
            own = self._own or [(start, content_end)]
            return _Turn(
                start=start,
                content_end=content_end,
                end=end,
                own=own,
                floor=floor,
                difference=difference,
                asked_with=self._asked_with,
            )
        place = self._place()
        searched, unlike_before = self._search_start(place)
        content_end, end, unlike_after = self._search_closing(place)
        return _Turn(
            start=searched,
            content_end=content_end,
            end=end,
            own=self._own or [(place.first, place.last)],
            floor=place.floor,
            difference=difference or unlike_before or unlike_after,
            asked_with=self._asked_with,
        )

    def _as_generated(self) -> tuple[int, int, int] | None:
        """Return start, content end and end of the turn, if the text is what a model is given, what it answers where
        this message is the last, and then perhaps more messages.

        This is true of most templates, and takes two renderings. None if it is not true, or if no special token closes
        the message there, or if other text follows those that close a tool call.
        """
        first, last = (self._own[0][0], self._own[-1][1]) if self._own else (len(self._text),) * 2
        prompt_end = self._after_prompt(0, first, last) if self._template.knows_generation_prompt else None
        answered = self._text_until_answer
        if prompt_end is None or answered is None or not answered.startswith(self._text[:prompt_end]):
            return None
        if not self._own and not self._called:
            return None  # the text may leave the message out
        start = _after_empty_thought(self._text, prompt_end, first)
        shift = _after_empty_thought(answered, prompt_end, len(answered)) - start
        runs = list(self._template.closing_run.finditer(answered, shift + (last if self._own else start)))
        if not runs or (self._called and answered[runs[-1].end() :].strip()):
            return None
        content_end, end = runs[0 if self._ends_with_text else -1].span()
        if not self._text.startswith(answered[start + shift : end], start):
            return None
        return start, content_end - shift, end - shift

    @property
    def _ends_with_text(self) -> bool:
        """Whether the message's content is the last thing that the template writes of it, so that the next special
        token closes the turn. After calls or reasoning, special tokens may stand inside of the turn."""
        return not self._called and any(text.strip() for text in texts_of(self._message))

    @cached_property
    def _text_until_answer(self) -> str | None:
        """The text of the conversation until this turn; None if the template raises."""
        whole = self._index + 1 == len(self._chat.messages)
        return self._text if whole else self._template.text_or_none(self._chat.until(self._index + 1))

    def _place(self) -> _Place:
        """Return where the text starts and ends to depend on the message: its contents, and what changes with it.

        Raises:
            InputError: Nothing shows this, or the text shows another message inside of it.
        """
        other = self._template.text_or_none(self._with_other_texts(self._chat))
        spans, overlap = list(self._own), 0
        if other not in (None, self._text):
            spans.append((common_start(self._text, other), len(self._text) - common_end(self._text, other)))
            overlap = max(end for _, end in spans) - spans[-1][1]
        if self._called:
            renamed = self._chat.with_message(self._index, change_calls(self._message, other_name))
            if (other := self._template.text_or_none(renamed)) not in (None, self._text):
                spans.append((common_start(self._text, other),) * 2)
        if not spans:
            raise InputError(f"{self.where}: the text does not show where it is")
        first, last = min(start for start, _ in spans), max(end for _, end in spans)
        answered = self._text_until_answer
        if any(first < start < last for start, _ in self._others) or (
            answered is not None and self._text[first:last] not in answered
        ):
            advice = "; without the content beside the call it can be learned" if self._called else ""
            raise InputError(f"{self.where}: the chat template writes another message in the midst of it{advice}")
        floor = max((end for _, end in self._others if end <= first), default=0)
        ceiling = min((start for start, _ in self._others if start >= last), default=len(self._text))
        return _Place(first=first, last=last, overlap=overlap, floor=floor, ceiling=ceiling)

    def _with_other_texts(self, chat: Conversation) -> Conversation:
        return chat.with_message(self._index, other_message(self._message, self._index, self._contents.marking))

    def _search_start(self, place: _Place) -> tuple[int | None, str]:
        """Return where the turn starts, and what stands otherwise before it than at inference.

        The start is the end of the generation prompt, and of an empty block of reasoning after it. It is searched in
        three ways, in this order:

        1. The text starts with what a model is given at inference, with or without reasoning.
        2. What a model is given after the last content stands in the text after that content, in whole or but for an
           opened block of reasoning. Such templates move the tools to the last message, for example.
        3. The turn starts with its content.
        """
        header = "the template writes no generation prompt, but a header before the answer" if self._header else ""
        start = self._after_prompt(place.floor, place.first, place.last)
        if start is None:
            start, difference = self._after_contents(place)
            header = header or difference
        if start is None:
            starts_with_text = bool(self._own) and place.first == self._own[0][0]
            unknown = "the template does not say what a model is given before it"
            return (place.first if starts_with_text else None), header or unknown
        return _after_empty_thought(self._text, start, place.first), header

    def _after_prompt(self, floor: int, first: int, last: int) -> int | None:
        """Return the end of a generation prompt that starts the text, or None.

        If more than white space lies between it and the message, another prompt may be longer: with or without
        reasoning. A prompt may end inside of the content, which may open with the tag that the prompt ends with.

        Args:
            floor: The first position at which it may end.
            first: The start of the message.
            last: The end of the message, before which it has to end.
        """
        longest = None
        for variables, prompt in self._prompts():
            fits = floor <= len(prompt) < max(last, first + 1) and self._text.startswith(prompt)
            if fits and (longest is None or len(prompt) > longest):
                longest, self._asked_with = len(prompt), variables
            if longest is not None and not self._text[longest:first].strip():
                break
        return longest

    def _prompts(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield what a model may be given before the answer, with the variables of which each is made.

        Each is rendered once, when it is first asked for.
        """
        for number, variables in enumerate(self._template.known(_PROMPTS)):
            if number == len(self._prompts_so_far):
                self._prompts_so_far.append(self._template.text_or_none(self._before, True, **variables))
            if (prompt := self._prompts_so_far[number]) is not None:
                yield variables, prompt + self._header

    @cached_property
    def _header(self) -> str:
        """What a template without a generation prompt writes before an answer."""
        if self._template.knows_generation_prompt:
            return ""
        return header_of_answer(self._template, self._before, self._template.text_or_none(self._before) or "")

    def _after_contents(self, place: _Place) -> tuple[int | None, str]:
        """Return where a generation prompt ends that follows the last content before the turn, and how the text before
        differs from inference; None and nothing if there is no such place."""
        before = self._text[place.floor : place.first]
        tails = []
        for variables in self._template.known(_PROMPTS):
            tail = tail_after_contents(self._template, self._before, self._contents.marking, **variables)
            tails.append("" if tail is None else tail + self._header)
            if tails[-1] and before.startswith(tails[-1]):
                why = "the messages before it look otherwise than when it is generated"
                return place.floor + len(tails[-1]), why + _LAST_ALONE
        if not self._template.knows_generation_prompt and not self._header:
            return None, ""
        opening = self._opening()
        if opening and (position := self._text.rfind(opening, place.floor, place.first)) >= 0:
            return position + len(opening), "what stands before its opening looks otherwise than when it is generated"
        for tail in tails:
            shared = tail[: self._last_boundary(tail, common_start(tail, before))]
            if shared.strip():
                why = "a part of what a model is given before it, such as `<think>`, is not shown"
                return place.floor + len(shared), why
        return None, ""

    def _opening(self) -> str:
        """Return what the generation prompt adds to the messages before the turn."""
        without, prompt = (self._template.text_or_none(self._before, adds) or "" for adds in (False, True))
        return prompt[len(without) :] if prompt.startswith(without) else self._header

    def _last_boundary(self, text: str, end: int) -> int:
        """Return the last position up to `end` at which a line, a word or a special token of a text ends."""
        ends = [match.end() for match in self._template.special.finditer(text)]
        ends += [match.end() for match in re.finditer(r"\s+", text)]
        return max((position for position in ends if position <= end), default=0)

    def _search_closing(self, place: _Place) -> tuple[int, int, str]:
        """Return where the special tokens that close the turn start and end, and how they differ from inference.

        They are the last ones that the template writes after the message both as the last one and in this text. If it
        writes none after a last message, the opening of the next message closes the turn. If it writes other ones
        there, those of this text are not what generation has to produce, and are not learned: start and end are then
        the same.
        """
        shown = self._text[place.last : place.ceiling]
        alone = self._alone_after(place)
        if alone is None:  # a token after the first one may open the next message
            only = self._template.closing.search(shown)
            start, end = only.span() if only else (0, 0)
            return place.last + start, place.last + end, ""
        common = shown[: self._before_cut_token(shown, common_start(shown, alone))]
        if runs := list(self._template.closing_run.finditer(common)):
            start, end = runs[0 if self._ends_with_text else -1].span()
            return place.last + start, place.last + end, ""
        end = place.last + len(common.rstrip())
        if self._template.special.search(alone):
            return end, end, "it ends otherwise than when no message follows" + _LAST_ALONE
        opening = self._template.closing.match(self._text, end, place.ceiling)
        return end, opening.end() if opening else end, ""

    def _alone_after(self, place: _Place) -> str | None:
        """Return what the template writes after the message if none follows; None if it raises."""
        text = self._text_until_answer
        if text is None or text.startswith(self._text[: place.last]):
            return None if text is None else text[place.last :]
        other = self._template.text_or_none(self._with_other_texts(self._chat.until(self._index + 1)))
        return None if other is None else text[len(text) - common_end(text, other) + place.overlap :]

    def _before_cut_token(self, text: str, end: int) -> int:
        """Return `end`, or the start of the special token of a text that `end` cuts."""
        return min((m.start() for m in self._template.special.finditer(text) if m.start() < end < m.end()), default=end)


def _after_empty_thought(text: str, start: int, first: int) -> int:
    """Return the end of an empty block of reasoning between a start and a message at `first`, or the start."""
    empty = _EMPTY_THOUGHT.match(text, start, max(start, first))
    return empty.end() if empty else start


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
