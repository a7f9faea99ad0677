"""Names and layout of a model's tensors in its Hugging Face folder.

Transformers renames tensors when it loads a folder, and joins some of them (the matrices of all experts become one
tensor). A folder that is saved has the same tensors as the folder that was loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)

from selfgen_ds.model import lora

_FILE = "tensors.json"


@dataclass(frozen=True, kw_only=True)
class StateDictLayout:
    """The stored tensors of a model, and their conversions."""

    tensors: dict[str, tuple[torch.Size, torch.dtype]]
    """Shape and dtype of the model's parameters and buffers, by name; tied ones once."""
    conversions: list[WeightTransform]
    """The conversions that transformers applies when it loads the folder."""
    config: PretrainedConfig

    @classmethod
    def of(cls, model: PreTrainedModel) -> StateDictLayout:
        """Return the layout of a model, whose parameters may be partitioned."""
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:
            conversions = _default_conversions(model)
        return cls(
            # A partitioned parameter is empty; `ds_shape` is its full shape.
            tensors={n: (getattr(t, "ds_shape", t.shape), t.dtype) for n, t in plain_tensors(model).items()},
            conversions=conversions,
            config=model.config,
        )

    def write(self, folder: Path) -> None:
        """Write the layout into a checkpoint's folder, for `read`."""
        content = {
            "tensors": {name: [list(shape), str(dtype)] for name, (shape, dtype) in self.tensors.items()},
            "conversions": [repr(conversion) for conversion in self.conversions],
        }
        (folder / _FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, config: PretrainedConfig, trust_remote_code: bool = False) -> StateDictLayout:
        """Read the layout of a checkpoint's model, without its tensors.

        Args:
            config: The configuration in the checkpoint.
            trust_remote_code: Whether code that the model brings in its own folder may run.
        """
        content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        conversions = []
        if content["conversions"]:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
                known = get_model_conversion_mapping(model)
            conversions = [conversion for conversion in known if repr(conversion) in content["conversions"]]
        return cls(
            tensors={
                name: (torch.Size(shape), getattr(torch, dtype.removeprefix("torch.")))
                for name, (shape, dtype) in content["tensors"].items()
            },
            conversions=conversions,
            config=config,
        )

    def groups(self) -> list[tuple[list[str], dict[str, Tensor]]]:
        """Return the smallest groups of tensors that can be converted separately.

        Returns:
            For each group, the names in the model, and the tensors that the folder has for them: name -> tensor on the
            meta device.
        """
        reversed_ = [conversion.reverse_transform() for conversion in self.conversions[::-1]]
        converters = [conversion for conversion in reversed_ if isinstance(conversion, WeightConverter)]
        members: dict[str, list[str]] = {}
        for name in self.tensors:
            members.setdefault(rename_source_key(name, [], converters, reverse=True)[0], []).append(name)
        empty = {n: torch.empty(shape, dtype=dtype, device="meta") for n, (shape, dtype) in self.tensors.items()}
        return [(names, self.convert({name: empty[name] for name in names})) for names in members.values()]

    def convert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the stored tensors for tensors of the model, which must be one or more whole groups."""
        return revert_weight_conversion(
            SimpleNamespace(_weight_conversions=self.conversions, config=self.config), tensors
        )


def plain_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a model that are stored, tied ones once, by their names in the model without adapters."""
    persistent = model.state_dict().keys()
    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in persistent}
    ignored = model._keys_to_ignore_on_save or ()
    plain = lora.without_adapters(tensors, lora.adapted_layers(model))
    return {name: tensor for name, tensor in plain.items() if name not in ignored}


def _default_conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """Return the conversions for a model that was not loaded from a folder: those of its model type."""
    known = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in known if not isinstance(conversion, PrefixChange)]
