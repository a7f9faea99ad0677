"""Train causal language models on the tokens they will meet when they run: their own.

The names of `__all__` are the library; `docs/library.md` shows how to use them. They are imported when they are first
asked for (PEP 562), because importing torch takes seconds that `selfgen-ds --help` need not wait for. `train` and
`evaluate` are not among the names: each would mean the module of this name as soon as the module is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfgen_ds.config import DataConfig as DataConfig
    from selfgen_ds.config import ModelConfig as ModelConfig
    from selfgen_ds.config import Recipe as Recipe
    from selfgen_ds.config import SelfgenConfig as SelfgenConfig
    from selfgen_ds.config import TrainConfig as TrainConfig
    from selfgen_ds.data.batches import TokenBatch as TokenBatch
    from selfgen_ds.data.batches import collate as collate
    from selfgen_ds.data.row import TrainingRow as TrainingRow
    from selfgen_ds.errors import InputError as InputError
    from selfgen_ds.evaluation.metrics import aggregate as aggregate
    from selfgen_ds.hashing import uniform as uniform
    from selfgen_ds.methods.method import AnswerMethod as AnswerMethod
    from selfgen_ds.methods.method import Method as Method
    from selfgen_ds.methods.method import Policy as Policy
    from selfgen_ds.methods.method import Question as Question
    from selfgen_ds.methods.method import RoundMethod as RoundMethod
    from selfgen_ds.methods.mixture import mix as mix
    from selfgen_ds.methods.mixture import replacement_mask as replacement_mask
    from selfgen_ds.model.head import loss_sum as loss_sum
    from selfgen_ds.model.policy import EnginePolicy as EnginePolicy
    from selfgen_ds.model.policy import Sampling as Sampling
    from selfgen_ds.model.reductions import add_reductions as add_reductions

__version__ = "0.1.0"

_MODULES = {
    "config": ("DataConfig", "ModelConfig", "Recipe", "SelfgenConfig", "TrainConfig"),
    "data.batches": ("TokenBatch", "collate"),
    "data.row": ("TrainingRow",),
    "errors": ("InputError",),
    "evaluation.metrics": ("aggregate",),
    "hashing": ("uniform",),
    "methods.method": ("AnswerMethod", "Method", "Policy", "Question", "RoundMethod"),
    "methods.mixture": ("mix", "replacement_mask"),
    "model.head": ("loss_sum",),
    "model.policy": ("EnginePolicy", "Sampling"),
    "model.reductions": ("add_reductions",),
}
_HOMES = {name: f"selfgen_ds.{module}" for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'selfgen_ds' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
