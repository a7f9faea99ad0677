"""Tests with expensive cases: which of the cases `make test` runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def matrix(names: str | tuple[str, ...], cases: Iterable[Any], **options: Any) -> pytest.MarkDecorator:
    """Parametrize a test; `make test` runs its first case, and `make test-all` every case.

    Of a test with two matrices, `make test` runs one case: the first of one with the first of the other. Only a first
    case may be a `pytest.param`.
    """
    first, *others = cases
    assert not any(hasattr(case, "marks") for case in others), "only the first case may be a pytest.param"
    rest = [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in others]
    return pytest.mark.parametrize(names, [first, *rest], **options)
