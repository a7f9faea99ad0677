"""`sft`: teacher forcing. The context is the reference."""

from __future__ import annotations

from typing import ClassVar

from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods.mixture import Policy


class Sft:
    """The baseline that every other method is compared with."""

    settings: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: SelfgenConfig, seed: int, total_steps: int) -> None:
        self.passes = 0

    def replace_probability(self, step: int) -> float:
        return 0.0

    def contexts(self, window: list[TokenBatch], policy: Policy, step: int) -> list[TokenBatch]:
        return window
