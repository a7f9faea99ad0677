"""What stands between an answer of the model and the corrected one, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from selfgen_ds.data.chat import ChatEncoder
from selfgen_ds.data.samples import Samples, end_tokens
from selfgen_ds.errors import InputError

TURN_CUE, TEXT_CUE = "Correct your answer.", "\nCorrected answer: "


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Asks the model to correct an answer of its own: `prompt + answer + closing + cue`, behind which it writes."""

    end_tokens: list[int] = field(default_factory=list)
    """Each of them ends an answer."""
    closing_ids: list[int] = field(default_factory=list)
    """What closes an answer's turn; nothing between texts."""
    cue_ids: list[int] = field(default_factory=list)
    """What asks for the correction, up to where the corrected answer starts."""

    def content(self, answer_ids: Sequence[int]) -> list[int]:
        """An answer without what ends it; one that was cut short as it is."""
        answer = list(answer_ids)
        if not answer or answer[-1] not in self.end_tokens:
            return answer
        del answer[-1]
        # some templates put white space before the token that closes a turn, and a model learns to
        before = [i for i, token in enumerate(self.closing_ids) if token in self.end_tokens][:1] or [0]
        lead = self.closing_ids[: before[0]]
        return answer[: len(answer) - len(lead)] if answer[len(answer) - len(lead) :] == lead else answer

    def prompt(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> list[int]:
        """What the model continues with a corrected answer.

        Args:
            answer_ids: An answer to `prompt_ids`, with or without its end token.
        """
        return [*prompt_ids, *self.content(answer_ids), *self.closing_ids, *self.cue_ids]


def correction(
    samples: Sequence[Samples], tokenizer: PreTrainedTokenizerBase, cue: str | None, setting: str = "selfgen.cue"
) -> Correction:
    """How a correction is asked for in such samples.

    Args:
        cue: Of conversations the content of a user's turn, otherwise text as it is, tokenised by itself. Special tokens
            that it spells stay text. None: `TURN_CUE` or `TEXT_CUE`.
        setting: Named in errors.

    Raises:
        InputError: The samples are conversations and texts, or the chat template does not take the cue.
    """
    conversations, used = sum(source.conversations for source in samples), sum(map(len, samples))
    ends = end_tokens(list(samples), tokenizer)
    if not conversations:
        text = TEXT_CUE if cue is None else cue
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []
        return Correction(end_tokens=ends, cue_ids=ids)
    if conversations < used:
        raise InputError(
            f"{setting}: a cue is a turn or text: expected conversations alone or texts alone, got {conversations} "
            f"conversations among {used} rows"
        )
    closing, ids = ChatEncoder(tokenizer, "all").between_answers(TURN_CUE if cue is None else cue, setting)
    return Correction(end_tokens=ends, closing_ids=closing, cue_ids=ids)
