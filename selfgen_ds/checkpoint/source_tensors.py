"""Read the safetensors files of the folder that a model is loaded from, one tensor at a time."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from selfgen_ds.checkpoint.state_dict_layout import StateDictLayout
from selfgen_ds.errors import InputError
from selfgen_ds.files import refusal


class SourceTensors:
    """The tensors of a model's safetensors files.

    Args:
        name: Hugging Face folder or hub id.

    Raises:
        InputError: There are no safetensors files, or one of them is damaged.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.headers: dict[str, Tensor] = {}
        """Tensors on the meta device, by name."""
        self._file_of: dict[str, str] = {}
        for file in _weight_files(name):
            try:
                self._read_headers(file)
            except (OSError, SafetensorError) as error:
                reason = refusal(error) or f"{file}: cannot be read: {error}"
                raise InputError(f"model.name_or_path: {reason}") from error

    def _read_headers(self, file: str) -> None:
        with _opened(file) as content:
            for tensor in content.keys():  # noqa: SIM118 (no mapping)
                part = content.get_slice(tensor)
                shape = part.get_shape()
                dtype = (part[:0] if shape else content.get_tensor(tensor)).dtype
                self._file_of[tensor] = file
                self.headers[tensor] = torch.empty(shape, dtype=dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """Return a tensor on the host."""
        with _opened(self._file_of[name]) as content:
            return content.get_tensor(name)


def _opened(file: str) -> Any:
    open(file, "rb").close()  # safetensors says of any file that cannot be opened that there is none
    return safe_open(file, framework="pt")


def _weight_files(name: str) -> list[str]:
    """Return the files that transformers loads: one, or the shards of an index."""
    if single := cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False):
        return [single]
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        raise InputError(f"model.name_or_path: {name!r} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    return get_checkpoint_shard_files(name, index)[0]


def stored_names(layout: StateDictLayout) -> dict[str, list[str]]:
    """Return the names that the folder has for the tensors of the model: name in the model -> names in the folder."""
    return {name: list(stored) for names, stored in layout.groups() for name in names}


def names_in_folder(model: PreTrainedModel, layout: StateDictLayout, headers: dict[str, Tensor]) -> dict[str, str]:
    """Return where each stored tensor of the model is in a folder: name that the layout gives -> name in the folder.

    A folder may have the prefix of the backbone's names where the class has none, or the reverse: GPT-2's published
    folder is that of the backbone, and a text model reads the folder of a multimodal one. Of tied tensors, a folder may
    have either. A tensor that the folder lacks is left out.
    """
    prefix, tied = f"{model.base_model_prefix}.", _tied_names(model, layout)
    found = {}
    for stored in dict.fromkeys(name for names in stored_names(layout).values() for name in names):
        alike = [stored, *(alias for alias, kept in tied.items() if kept == stored)]
        candidates = [c for name in alike for c in (name, prefix + name, name.removeprefix(prefix))]
        if (name := next((candidate for candidate in candidates if candidate in headers), None)) is not None:
            found[stored] = name
    return found


def untaken(model: PreTrainedModel, layout: StateDictLayout, headers: dict[str, Tensor]) -> list[str]:
    """Return the names of a folder's tensors that the model does not take, in order."""
    prefix, tied = f"{model.base_model_prefix}.", _tied_names(model, layout)
    taken = set(names_in_folder(model, layout, headers).values())
    taken |= {alias for name in tied for alias in (name, prefix + name, name.removeprefix(prefix))}
    return sorted(headers.keys() - taken)


def _tied_names(model: PreTrainedModel, layout: StateDictLayout) -> dict[str, str]:
    """Return the folder's names of tied tensors: any of them -> the one that the layout has."""
    aliases: dict[str, str] = {}
    for pair in model.all_tied_weights_keys.items():
        stored = {name: next(iter(layout.convert({name: torch.empty(1, device="meta")}))) for name in pair}
        known = [stored[name] for name in pair if name in layout.tensors]
        aliases |= {alias: known[0] for alias in stored.values() if known and alias != known[0]}
    return aliases
