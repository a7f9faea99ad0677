"""Load the files of a checkpoint as data: no code in them runs.

DeepSpeed loads its files with `weights_only=False`. An environment variable of torch, set when this module is imported,
overrides this for the whole process: torch then refuses everything but tensors, plain containers, and the classes
below, which DeepSpeed keeps in its files.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from selfgen_ds.errors import InputError

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

os.environ[_FORCE] = "1"
torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


def load(file: Path, **settings: Any) -> Any:
    """Load a file as DeepSpeed loads its files: with everything that `loading` allows, and no more."""
    return torch.load(file, map_location="cpu", weights_only=False, **settings)


@contextmanager
def loading(trust: bool) -> Iterator[None]:
    """Refuse the files of a checkpoint that hold code; with `trust`, let their code run.

    Args:
        trust: Whether the files may run code.

    Raises:
        InputError: A file holds more than plain data and is not trusted. The line names the file.
    """
    load_file = torch.load

    def load_plain_data(file: Any, *arguments: Any, **settings: Any) -> Any:
        try:
            return load_file(file, *arguments, **settings)
        except (pickle.UnpicklingError, RuntimeError) as error:  # RuntimeError: `torch.save` did not write the file
            match = re.search(r"GLOBAL (\S+)", str(error))
            name = f" ({match[1]})" if match else ""
            raise InputError(
                f"{os.path.realpath(file)}: expected tensors and plain containers, found something else{name}, which "
                "may run code when it is loaded; to load the file anyway, set trust_checkpoint: true"
            ) from error

    if trust:
        del os.environ[_FORCE]
    else:
        torch.load = load_plain_data  # type: ignore[assignment]
    try:
        yield
    finally:
        os.environ[_FORCE] = "1"
        torch.load = load_file
