"""Tests with expensive cases: which of the cases `make check` and `make test` run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def matrix(names: str | tuple[str, ...], cases: Iterable[Any], **options: Any) -> pytest.MarkDecorator:
    """Parametrize a test; `make test` runs its first case, and `make test-all` every case.

    Of a test with two matrices, `make test` runs one case: the first of one with the first of the other. Only a first
    case may be a `pytest.param`.
    """
    return _split(names, list(cases), 1, pytest.mark.slow, options)


def sweep(names: str | tuple[str, ...], cases: Iterable[Any], check: int = 1, **options: Any) -> pytest.MarkDecorator:
    """Parametrize a unit test; `make check` runs its first cases, as many as `check`, and `make test` every case."""
    return _split(names, list(cases), check, pytest.mark.test, options)


def _split(
    names: str | tuple[str, ...], cases: list[Any], first: int, mark: pytest.MarkDecorator, options: dict[str, Any]
) -> pytest.MarkDecorator:
    """Parametrize a test, and mark all cases but the first ones. A case is a value, or a plain tuple of values."""
    assert not any(hasattr(case, "marks") for case in cases[first:]), "only a first case may be a pytest.param"
    rest = [pytest.param(*(case if type(case) is tuple else (case,)), marks=mark) for case in cases[first:]]
    return pytest.mark.parametrize(names, [*cases[:first], *rest], **options)
