"""Plans for tests of methods that need no run."""

from __future__ import annotations

from typing import Any

from selfgen_ds.data.correction import Correction
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.methods.method import Plan


def plan(**changes: Any) -> Plan:
    """Return the plan of a small run over bytes: two steps of four rows per epoch."""
    small: dict[str, Any] = {
        "seed": 0,
        "total_steps": 4,
        "step_size": 4,
        "epoch_size": 8,
        "micro_batch_size": 2,
        "max_length": 64,
        "tokenizer": byte_tokenizer(),
        "correction": Correction(),
    }
    return Plan(**(small | changes))
