"""The metrics of the studies: which are kept, which differences are tested, and what tables and figures show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """A metric of `evaluation.json`, or `differing_share`; a study has some of them."""

    name: str
    title: str = ""
    """What tables and figures call it."""
    tested: bool = False
    """Whether its differences are tested; each one more makes the others less sure."""
    tabled: bool = False
    """Whether the tables of docs/evidence.md have it."""
    drawn: bool = False
    """Whether the figures of arms have it."""


METRICS = (
    Shown("final_answer", "final answer", tested=True, tabled=True, drawn=True),
    Shown("exact_match", "greedy answers", tested=True, tabled=True, drawn=True),
    Shown("free_running_accuracy", "tokens of greedy answers", tested=True),
    Shown("rouge_l", "ROUGE-L", tested=True, tabled=True, drawn=True),
    Shown("bleu", "BLEU", tested=True, tabled=True),
    Shown("realized_slots", "slots", tested=True, tabled=True, drawn=True),
    Shown("embedding_distance", "embedding distance", tested=True, tabled=True),
    Shown("follows", "follows from its first letter", tested=True, tabled=True),
    Shown("sampled_1_follows", "the same at T 1", tested=True, tabled=True, drawn=True),
    Shown("sampled_1_exact_match", "whole answers at T 1", tested=True, tabled=True, drawn=True),
    Shown("sampled_1_rouge_l", "ROUGE-L at T 1", tested=True, tabled=True, drawn=True),
    Shown("sampled_1_realized_slots", "slots at T 1", tested=True, tabled=True),
    Shown("sampled_1.5_accuracy", "tokens at T 1.5", tested=True),
    Shown("sampled_2_exact_match", "whole answers at T 2", tested=True, tabled=True, drawn=True),
    Shown("sampled_2_accuracy", "tokens at T 2", tested=True, tabled=True, drawn=True),
    Shown("sampled_2.5_accuracy", "tokens at T 2.5"),
    Shown("sampled_2_after_slip_last", "own slips mended", tested=True, tabled=True),
    Shown("recovery_1", "the token after a forced error"),
    Shown("recovery_4", "after a forced error", tested=True, tabled=True, drawn=True),
    Shown("recovery_last", "the last token after a forced error"),
    Shown("corrected_1_exact_match", "corrected answers", tested=True, tabled=True),
    Shown("corrected_1_wrong_to_right", "mended by a correction", tabled=True),
    Shown("corrected_1_right_to_wrong", "broken by a correction", tabled=True),
    Shown("corrected_2_exact_match", "answers corrected twice"),
    Shown("noise_0.05_accuracy", "tokens with changed weights"),
    Shown("noise_0.05_exact_match", "answers with changed weights", tested=True),
    Shown("calibration_error", "calibration error"),
    Shown("entropy", "entropy"),
    Shown("teacher_forced_accuracy", "tokens on reference prefixes"),
    Shown("free_running_loss", "loss on own prefixes", tested=True),
    Shown("loss", "loss", tested=True, tabled=True),
    Shown("differing_share", "drawn tokens that differ", tabled=True),
)
TITLES = {metric.name: metric.title for metric in METRICS}
TESTED = [metric.name for metric in METRICS if metric.tested]
