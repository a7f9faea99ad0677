"""The methods: each one chooses the context that the model reads; the target is always the reference.

A new method is one class with the interface of `Method` and one line in `METHODS`.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods.mixture import Policy
from selfgen_ds.methods.scheduled_sampling import ScheduledSampling
from selfgen_ds.methods.sft import Sft


class Method(Protocol):
    """Maps the micro-batches of one optimizer step to what is trained on. Holds no state that a restart needs."""

    settings: ClassVar[frozenset[str]]
    """Fields of `selfgen` that it reads; others are refused in its recipes."""
    passes: int
    """Self-generated-token passes a step."""

    def __init__(self, config: SelfgenConfig, seed: int, total_steps: int) -> None: ...

    def replace_probability(self, step: int) -> float:
        """p of the mixture in this optimizer step (from 0)."""
        ...

    def contexts(self, window: list[TokenBatch], policy: Policy, step: int) -> list[TokenBatch]:
        """The window with contexts to read. Collective if it asks the policy for anything."""
        ...


METHODS: dict[str, type[Method]] = {
    "sft": Sft,
    "scheduled_sampling": ScheduledSampling,
}
