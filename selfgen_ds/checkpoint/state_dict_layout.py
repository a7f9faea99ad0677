"""The tensors of a Hugging Face folder: which of the model's they are made of.

Transformers renames tensors when it loads a folder and joins some of them (the matrices of all experts become
one); a saved folder has them as the loaded one had.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightTransform,
    apply_converters,
    revert_weight_conversion,
)

from selfgen_ds.model import lora

_FILE = "tensors.json"
_HF_FOLDER = "huggingface"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors that have to be converted together."""

    tensors: list[str]
    """Names in the model."""
    stored: dict[str, Tensor]
    """What the folder has of them: name -> tensor without data."""


@dataclass(frozen=True, kw_only=True)
class StateDictLayout:
    """What of a model is stored, and how."""

    tensors: dict[str, tuple[torch.Size, torch.dtype]]
    """Parameters and buffers of the model, tied ones once."""
    conversions: list[WeightTransform]
    """What transformers applied, or would apply, when it loads them."""
    config: PretrainedConfig

    @classmethod
    def of(cls, model: PreTrainedModel) -> StateDictLayout:
        """Of a model whose parameters may be partitioned."""
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:
            conversions = _default_conversions(model)
        return cls(
            # a partitioned parameter is empty; `ds_shape` is its real shape
            tensors={n: (getattr(t, "ds_shape", t.shape), t.dtype) for n, t in plain_tensors(model).items()},
            conversions=conversions,
            config=model.config,
        )

    def write(self, folder: Path) -> None:
        """Into a checkpoint, for `read`."""
        content = {
            "tensors": {name: [list(shape), str(dtype)] for name, (shape, dtype) in self.tensors.items()},
            "conversions": [repr(conversion) for conversion in self.conversions],
        }
        (folder / _FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> StateDictLayout:
        """Of a checkpoint; needs none of its tensors."""
        content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder / _HF_FOLDER)
        conversions = []
        if content["conversions"]:
            with torch.device("meta"):
                known = get_model_conversion_mapping(AutoModelForCausalLM.from_config(config))
            conversions = [conversion for conversion in known if repr(conversion) in content["conversions"]]
        return cls(
            tensors={
                name: (torch.Size(shape), getattr(torch, dtype.removeprefix("torch.")))
                for name, (shape, dtype) in content["tensors"].items()
            },
            conversions=conversions,
            config=config,
        )

    def groups(self) -> list[Group]:
        """All tensors, in the fewest that can be converted by themselves."""
        reversed_ = [conversion.reverse_transform() for conversion in self.conversions[::-1]]
        converters = [conversion for conversion in reversed_ if isinstance(conversion, WeightConverter)]
        members: dict[str, list[str]] = {}
        for name in self.tensors:
            members.setdefault(apply_converters(name, converters)[0], []).append(name)
        return [Group(tensors=names, stored=self.convert(self._without_data(names))) for names in members.values()]

    def _without_data(self, names: list[str]) -> dict[str, Tensor]:
        return {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name in names
            for shape, dtype in [self.tensors[name]]
        }

    def convert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model as they are stored; all of a group at once."""
        return revert_weight_conversion(
            SimpleNamespace(_weight_conversions=self.conversions, config=self.config), tensors
        )


def plain_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is stored of a model, tied tensors once, under the names that they have without adapters."""
    persistent = model.state_dict().keys()
    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in persistent}
    ignored = model._keys_to_ignore_on_save or ()
    plain = lora.without_adapters(tensors, lora.adapted_layers(model))
    return {name: tensor for name, tensor in plain.items() if name not in ignored}


def _default_conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """Of a model that comes from no folder: the folder is to look as others of its type do."""
    known = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in known if not isinstance(conversion, PrefixChange)]
