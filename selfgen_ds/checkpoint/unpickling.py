"""Files of a checkpoint are data: nothing in them is run when they are loaded."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

# Torch refuses everything but tensors, plain containers and these classes, which DeepSpeed keeps in its files; it
# passes `weights_only=False` itself, which this overrides.
os.environ[_FORCE] = "1"
torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


def load(file: Path, **settings: Any) -> Any:
    """As DeepSpeed loads its files: with all that `trusting` allows, and no more."""
    return torch.load(file, map_location="cpu", weights_only=False, **settings)


def refused(files: Iterable[Path]) -> list[str]:
    """What is wrong with files that hold more than data, a line each. Their tensors are not read."""
    found = []
    for file in files:
        try:
            torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:  # the latter for what `torch.save` did not write
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f" ({named[1]})" if named else ""
            found.append(
                f"{file}: expected tensors and plain containers, found something else{what}, which may run code when "
                "it is loaded; trust_checkpoint: true loads it all the same"
            )
    return found


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Lift the refusal for as long as files are loaded, if their folder is trusted."""
    if trust:
        del os.environ[_FORCE]
    try:
        yield
    finally:
        os.environ[_FORCE] = "1"
