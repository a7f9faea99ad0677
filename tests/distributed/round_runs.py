"""Runs of the methods with rounds, and what they leave on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfgen_ds.config import Recipe, SelfgenConfig
from selfgen_ds.rounds.store import load_table, read_audit

TIMEOUT = 90.0
DROPOUT = {"attention_dropout": 0.1}  # so that the state of torch's generators matters too
METHODS = {
    "bash": SelfgenConfig(method="bash", replace_probability=0.5, temperature=2.0),
    "rac": SelfgenConfig(method="rac", temperature=2.0, max_new_tokens=12),
}


def rounds(settings: Recipe) -> list[str]:
    return sorted(path.name for path in (Path(settings.output_dir) / "rollouts").glob("round-*"))


def drawn(settings: Recipe, name: str) -> list[dict[str, Any]]:
    return list(load_table(Path(settings.output_dir) / "rollouts" / name).with_format(None))


def audit(settings: Recipe, name: str) -> dict[str, Any]:
    """Return the record of what drew a round, without times."""
    found = read_audit(Path(settings.output_dir) / "rollouts" / name)
    return {key: value for key, value in found.items() if key not in ("started", "seconds")}
