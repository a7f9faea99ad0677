"""Names of modules and parameters."""

from __future__ import annotations

import re


def numberless(name: str) -> str:
    """Return a dotted name with * for the numbers of layers and experts."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
