"""The folder that a run's model is loaded from: checked before, compared with the loaded model, kept for exports.

Under ZeRO-3, transformers assumes that a folder fits its model: it reports no tensor that the model does not take, and
ties weights without looking at their values. So the plain loader, which reports both, first loads the headers of the
files onto the meta device. After the real loading, every tensor of the model is compared with its file.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from selfgen_ds.checkpoint.source_tensors import SourceTensors, names_in_folder, stored_names, untaken
from selfgen_ds.checkpoint.state_dict_layout import StateDictLayout, plain_tensors
from selfgen_ds.config import LoraConfig, ModelConfig
from selfgen_ds.errors import InputError, Problems
from selfgen_ds.files import absolute_folder, refusal
from selfgen_ds.model import lora
from selfgen_ds.model.gathering import gather_copy, is_finite
from selfgen_ds.model.loading import from_config
from selfgen_ds.model.reach import Reach

log = logging.getLogger("selfgen_ds")

_FILE = "source.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a run's model comes from, and the tensors that its exports copy from there."""

    model: ModelConfig
    """The recipe's section `model`; the path of a folder is absolute."""
    kept: list[str] = field(default_factory=list)
    """Names, in the folder, of the tensors that the model does not take, and of those that text does not reach."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Names in the folder of the tensors that the model would store under another name: the model's -> the folder's."""

    def names(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors that the model stores by the names that the folder has for them."""
        return {self.renamed.get(name, name): tensor for name, tensor in stored.items()}

    def of_adapted(self, model: PreTrainedModel) -> Source:
        """Return the source with the targets that the model's adapters have in the place of `all-linear`."""
        if self.model.lora is None:
            return self
        return replace(
            self, model=replace(self.model, lora=replace(self.model.lora, target_modules=lora.targets_of(model)))
        )

    def merging(self) -> Source:
        """Return the source for an export of the whole model, with the adapters merged if it has some."""
        if self.model.lora is None:
            return self
        return replace(self, model=replace(self.model, lora=replace(self.model.lora, export="merged")))

    def write(self, folder: Path) -> None:
        """Write the source into a checkpoint's folder, for `read`."""
        (folder / _FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Source:
        """Read the source of a checkpoint's model.

        Raises:
            InputError: An older version of selfgen-ds wrote the checkpoint.
        """
        if not (folder / _FILE).exists():
            raise InputError(f"{folder}: an older selfgen-ds wrote it, without {_FILE}; export it with that version")
        content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        adapter = content["model"]["lora"]
        model = ModelConfig(**content["model"] | {"lora": None if adapter is None else LoraConfig(**adapter)})
        return cls(model=model, kept=content["kept"], renamed=content["renamed"])

    def tensors(self) -> SourceTensors | None:
        """Return the tensors of the folder if exports copy some of them.

        Raises:
            InputError: The folder no longer exists.
        """
        if not self.kept:
            return None
        base = lora.base_of(str(self.model.name_or_path))
        if Path(base).is_absolute() and not Path(base).is_dir():
            raise InputError(
                f"{base}: this folder no longer exists, but the export copies {len(self.kept)} tensors from it, the "
                f"first is {self.kept[0]}; put it back"
            )
        return SourceTensors(base)


def inspect_source(problems: Problems, model: ModelConfig, config: PretrainedConfig, reach: Reach) -> Source:
    """Check that every tensor of the model is in the folder, in its shape, and untie weights that differ there.

    Args:
        config: Its `tie_word_embeddings` becomes False if the folder has another output layer than its embeddings.
        reach: What text rows reach.
    """
    if model.name_or_path is None:
        with torch.device("meta"):
            unreached = reach.unreached(from_config(model, config))
        if unreached:
            problems.add(
                f"model.preset: text does not reach {unreached[0]} of model type {config.model_type!r}, which only a "
                "pretrained model can have; give model.name_or_path, or the model type of the text model"
            )
        return Source(model=model)
    located = replace(model, name_or_path=absolute_folder(model.name_or_path))
    base = lora.base_of(model.name_or_path)
    tensors = SourceTensors(base)
    built, report = _plain_load(model, config, tensors)
    where = f"model.name_or_path: {model.name_or_path!r}"
    if absent := sorted(report["missing_keys"]):
        whole = "take a whole checkpoint, or mend config.json"
        problems.add(f"{where} lacks {len(absent)} tensors, the first is {absent[0]}; {whole}")
    if other := sorted(report["mismatched_keys"]):
        tensor, found, expected = other[0]
        shapes = f"{tensor}, whose shape is {list(found)} there and {list(expected)} in the model"
        problems.add(f"{where} has {len(other)} tensors of another shape, the first is {shapes}")
    if absent or other:
        return Source(model=located)
    layout = StateDictLayout.of(built)
    with problems.collect():
        _untie(where, config, built, layout, tensors)
    stored, in_folder = stored_names(layout), names_in_folder(built, layout, tensors.headers)
    if initialized := sorted({name for names in stored.values() for name in names} - in_folder.keys()):
        log.info(
            "%s lacks %d tensors that transformers gives their initial values, the first is %s",
            *(where, len(initialized), initialized[0]),
        )
    if kept := untaken(built, layout, tensors.headers):
        log.info(
            "%s: %s does not take %d tensors; exports copy them, the first is %s",
            *(where, type(built).__name__, len(kept), kept[0]),
        )
    unreached = [] if model.lora is not None else reach.unreached(built)
    kept += sorted({in_folder[name] for n in unreached for name in stored[n] if name in in_folder})
    renamed = {
        own: name for own, name in in_folder.items() if own != name and (own.endswith(name) or name.endswith(own))
    }
    return Source(model=located, kept=kept, renamed=renamed)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    before = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(before)


def _plain_load(
    model: ModelConfig, config: PretrainedConfig, tensors: SourceTensors
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model that plain transformers makes of the folder, on the meta device, and what it reports."""
    with torch.device("meta"):
        kind = type(from_config(model, config, attn_implementation=model.attn_implementation))
    text = config.get_text_config(decoder=True)
    with _quiet_transformers():
        return kind.from_pretrained(
            None,
            config=text if kind.config_class is type(text) else config,
            state_dict=dict(tensors.headers),
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            attn_implementation=model.attn_implementation,
        )


def _untie(
    where: str, config: PretrainedConfig, built: PreTrainedModel, layout: StateDictLayout, tensors: SourceTensors
) -> None:
    """Make the configuration say that weights are not tied if the folder has both of them, and they differ.

    Plain transformers does not tie such weights either.

    Raises:
        InputError: The model ties weights other than those of embeddings and output layer, and they differ.
    """
    stored, in_folder = stored_names(layout), names_in_folder(built, layout, tensors.headers)
    for target, other in built.all_tied_weights_keys.items():
        if target not in stored or other not in stored:  # the folder has one of them, and both are one tensor
            continue
        one, same = (tensors.read(in_folder[stored[name][0]]) for name in (target, other))
        if torch.equal(one, same):
            continue
        if built.get_parameter(target) is not built.get_output_embeddings().weight:
            raise InputError(f"{where} has different values for {target} and {other}, which the model ties")
        config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False
        log.info(
            "%s: %s differs from %s, and is trained apart from it although config.json ties them", where, target, other
        )


def compare_with_source(model: PreTrainedModel, name: str, reads: bool) -> None:
    """Check that the model holds what the folder holds, tensor by tensor, in the model's dtype.

    Collective if the model is partitioned: every rank must call this.

    Args:
        name: The folder or hub id that the model was loaded from.
        reads: Whether this rank reads the folder and compares.

    Raises:
        InputError: A tensor differs, cannot be read, or is not finite; on ranks that compare.
    """
    layout, loaded = StateDictLayout.of(model), plain_tensors(model)
    problems, tensors, in_folder = Problems(), None, {}
    if reads:
        with problems.collect():  # the other ranks gather to the end, so this one does too, whatever it finds
            tensors = SourceTensors(lora.base_of(name))
            in_folder = names_in_folder(model, layout, tensors.headers)
    for names, _ in layout.groups():
        copies = {name: copy for name in names if (copy := gather_copy(loaded[name], reads)) is not None}
        if tensors is not None and not problems.lines:
            trained = isinstance(loaded[names[0]], nn.Parameter)
            if problem := _difference(layout.convert(copies), tensors, in_folder, trained):
                problems.add(f"model.name_or_path: {name!r}: {problem}")
    problems.raise_all()


def _difference(stored: dict[str, Tensor], tensors: SourceTensors, in_folder: dict[str, str], trained: bool) -> str:
    """Return how the first of some loaded tensors differs from the folder's, or why it cannot be trained; else nothing.

    Args:
        stored: The loaded tensors, by the names that the model stores them under.
        trained: Whether they are parameters. A buffer may hold infinity.
    """
    for name, tensor in stored.items():
        if name not in in_folder:  # plain transformers initializes some tensors that a folder lacks
            continue
        try:
            original = tensors.read(in_folder[name]).to(tensor.dtype)
        except (OSError, SafetensorError) as error:
            return f"{in_folder[name]} cannot be read: {refusal(error) or error}"
        if trained and not is_finite(original):
            return f"{in_folder[name]} holds NaN or infinity; mend the file"
        if not torch.equal(tensor[: len(original)] if original.ndim else tensor, original):  # rows may be added
            return f"{in_folder[name]} was not loaded as it is there"
    return ""


def write_configs(model: PreTrainedModel, config: PretrainedConfig, name: str | None, folder: Path) -> None:
    """Write `config.json` and `generation_config.json`, and the code that the model brings in its own folder.

    The generation defaults are written without transformers' check, which would refuse the contradictory settings of
    some published models as soon as one setting is changed.

    Args:
        config: The configuration that the model was loaded with.
        name: The folder or hub id that the model was loaded from, if any.
    """
    written, code = whole_config(model, config), []
    if name is not None and hasattr(written, "auto_map"):
        code = list(Path(cached_file(lora.base_of(name), CONFIG_NAME)).parent.glob("*.py"))
        written.auto_map = {kind: _in_folder(c, {file.stem for file in code}) for kind, c in written.auto_map.items()}
    written.save_pretrained(folder)
    for file in code:
        shutil.copy(file, folder)
    model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True)


def _in_folder(code: Any, modules: set[str]) -> Any:
    """Return the entry of an `auto_map` for code that is in the model's own folder.

    For a hub id, transformers puts the id before the name of each class. Code of another repository keeps its id.

    Args:
        code: `module.Class`, with an id and `--` before it or not, None, or a list of these.
        modules: The modules in the folder.
    """
    if isinstance(code, list):
        return [_in_folder(part, modules) for part in code]
    local = str(code).rpartition("--")[2]
    return local if local.split(".")[0] in modules else code


def whole_config(model: PreTrainedModel, config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration that a folder with the model and all tensors of its source has.

    Args:
        config: The configuration of the source. A model of text alone takes only the part of it that describes text.
    """
    if type(config) is type(model.config):
        return model.config
    for name, value in vars(config).items():
        if type(value) is type(model.config):
            setattr(config, name, model.config)
    config.dtype = model.config.dtype
    config.tie_word_embeddings = model.config.tie_word_embeddings
    return config
