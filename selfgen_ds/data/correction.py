"""The request to correct an answer: the tokens between the model's answer and the corrected one.

Training (`rac`) and evaluation ask in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from selfgen_ds.chat.encoder import ChatEncoder
from selfgen_ds.data.encoding import tokenize_plain
from selfgen_ds.data.samples import Samples, end_tokens
from selfgen_ds.errors import InputError

TURN_CUE, TEXT_CUE = "Correct your answer.", "\nCorrected answer: "


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Asks the model to correct its answer: it reads `prompt + answer + closing + cue` and writes the correction."""

    end_tokens: list[int] = field(default_factory=list)
    """Tokens that each end an answer."""
    closing_ids: list[int] = field(default_factory=list)
    """Tokens that close the turn of an answer; none between texts."""
    cue_ids: list[int] = field(default_factory=list)
    """Tokens that ask for the correction, up to the start of the corrected answer."""

    def content(self, answer_ids: Sequence[int]) -> list[int]:
        """Return an answer without the tokens that end it; an answer that was cut short stays as it is."""
        answer = list(answer_ids)
        if not answer or answer[-1] not in self.end_tokens:
            return answer
        del answer[-1]
        # Some templates put white space before the token that closes a turn, and a model learns to write it.
        before = [i for i, token in enumerate(self.closing_ids) if token in self.end_tokens][:1] or [0]
        lead = self.closing_ids[: before[0]]
        return answer[: len(answer) - len(lead)] if answer[len(answer) - len(lead) :] == lead else answer

    def prompt(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> list[int]:
        """Return the tokens after which the model writes a corrected answer.

        Args:
            answer_ids: An answer to `prompt_ids`, with or without its end token.
        """
        return [*prompt_ids, *self.content(answer_ids), *self.closing_ids, *self.cue_ids]


def correction(
    samples: Sequence[Samples], tokenizer: PreTrainedTokenizerBase, cue: str | None, setting: str = "selfgen.cue"
) -> Correction:
    """Return the request for a correction in the form of the samples.

    Args:
        cue: In conversations, the content of a user's turn; between texts, text that is tokenized by itself. Special
            tokens that the cue spells stay text. None stands for `TURN_CUE` or `TEXT_CUE`.
        setting: Name of the setting that errors blame.

    Raises:
        InputError: Some samples are conversations and others are texts, or the chat template does not accept the cue.
    """
    conversations, used = sum(source.conversations for source in samples), sum(map(len, samples))
    ends = end_tokens(list(samples), tokenizer)
    if not conversations:
        text = TEXT_CUE if cue is None else cue
        # Some tokenizers put a space before a text, even before an empty one.
        return Correction(end_tokens=ends, cue_ids=tokenize_plain([text], tokenizer)[0] if text else [])
    if conversations < used:
        raise InputError(
            f"{setting}: a cue is a turn or text: expected conversations alone or texts alone, got {conversations} "
            f"conversations among {used} rows"
        )
    closing, ids = ChatEncoder(tokenizer, "all").between_answers(TURN_CUE if cue is None else cue, setting)
    return Correction(end_tokens=ends, closing_ids=closing, cue_ids=ids)
