"""`sft`: teacher forcing. The context is the reference."""

from __future__ import annotations

from selfgen_ds.methods.method import Method


class Sft(Method):
    """The baseline that the other methods are compared with."""
