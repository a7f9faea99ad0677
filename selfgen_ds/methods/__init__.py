"""The methods: each one chooses the context that the model reads; the target is always the reference.

A new method is one subclass of `selfgen_ds.methods.method.Method`, in this package or in a module of the user, which
the recipe names: `selfgen.method: module:Class`.
"""

from __future__ import annotations

from importlib import import_module

from selfgen_ds.errors import InputError
from selfgen_ds.methods.bash import Bash
from selfgen_ds.methods.method import Method, RoundMethod
from selfgen_ds.methods.noise import Noise
from selfgen_ds.methods.own_samples import OwnSamples
from selfgen_ds.methods.rac import Rac
from selfgen_ds.methods.scheduled_sampling import ScheduledSampling
from selfgen_ds.methods.sft import Sft

METHODS: dict[str, type[Method]] = {
    "sft": Sft,
    "scheduled_sampling": ScheduledSampling,
    "bash": Bash,
    "rac": Rac,
    "noise": Noise,
    "own_samples": OwnSamples,
}
"""The last two are controls: what a gain has to be compared with."""


def find(name: str) -> type[Method]:
    """Return the class of a method.

    Args:
        name: A name of `METHODS`, or `module:Class`.

    Raises:
        InputError: There is no such method.
    """
    if name in METHODS:
        return METHODS[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute) if attribute else None
    except Exception as error:  # a module of the user can raise anything
        raise InputError(f"selfgen.method: {name!r}: {' '.join(str(error).split())}") from error
    if not (isinstance(found, type) and issubclass(found, Method) and found is not RoundMethod):
        raise InputError(f"selfgen.method: expected one of {', '.join(METHODS)}, or module:Class, got {name!r}")
    return found
