"""Find out what text rows reach in a model: parameters that get no gradient, and modules that only some rows run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from selfgen_ds.model.names import numberless
from selfgen_ds.model.small_copy import random_ids

log = logging.getLogger("selfgen_ds")

_ROWS = 3  # random rows that a model is tried with, in evaluation mode and in training mode
_LENGTH = 13  # tokens of a row


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What random text rows reach in a small copy of a model."""

    reached: dict[str, bool]
    """Whether a parameter got a gradient from any row, by its name in the copy."""
    routing: list[str]
    """Names of the modules that run for every row, but run parts of themselves for some rows only."""

    def unreached(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters of the model itself that text does not reach.

        A parameter that the copy lacks, such as one of a later layer, is judged by those whose names differ from its
        name in numbers only. A part of a routing module that no row happened to run counts as reached.
        """
        alike: dict[str, bool] = {}
        for name, reached in self.reached.items():
            alike[numberless(name)] = alike.get(numberless(name), False) or reached
        routing = tuple(f"{numberless(name)}." for name in self.routing)
        return [
            name
            for name, _ in model.named_parameters()
            if not self.reached.get(name, alike.get(numberless(name), True))
            and not numberless(name).startswith(routing)
        ]

    def routing_modules(self, model: nn.Module) -> list[str]:
        """Return the names of the routing modules of the model itself."""
        routing = {numberless(name) for name in self.routing}
        return [name for name, _ in model.named_modules() if numberless(name) in routing]


def freeze(model: nn.Module, names: list[str]) -> None:
    """Freeze parameters, and say in the log which parts of the model they make up."""
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)
    if names:
        count = sum(getattr(parameters[name], "ds_numel", parameters[name].numel()) for name in names)
        log.info(
            "text does not reach %d tensors with %.1f million parameters (%s): they stay as they are",
            *(len(names), count / 1e6, ", ".join(_parts(model))),
        )


def _parts(model: nn.Module) -> list[str]:
    """Return the largest parts of a model that are frozen as a whole, with numbers in their names replaced by *."""
    frozen = [name for name, module in model.named_modules() if _is_frozen(module)]
    frozen += [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    inside = {name for name in frozen if any(name.startswith(f"{other}.") for other in frozen)}
    return list(dict.fromkeys(numberless(name) for name in frozen if name not in inside))


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def try_rows(model: PreTrainedModel) -> Reach:
    """Run forward and backward of random rows through a small copy, in evaluation and in training mode."""
    for module in model.modules():
        if getattr(module, "layerdrop", 0.0) > 0.0:
            module.layerdrop = 0.9  # so that few rows suffice to see that layers are skipped
    runs: list[set[str]] = []
    with torch.enable_grad():
        for training in (False, True):
            model.train(training)
            for _ in range(_ROWS):
                with _recording(model) as called:
                    logits: Tensor = model(random_ids(model, _LENGTH), use_cache=False).logits
                logits.float().square().mean().backward()
                runs.append(called)
    model.eval()
    reached = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    always = set.intersection(*runs)
    sometimes = set.union(*runs) - always
    return Reach(reached=reached, routing=sorted({_nearest(always, name) for name in sometimes}))


def _nearest(modules: set[str], name: str) -> str:
    """Return the innermost of some modules that encloses a module."""
    while name not in modules:
        name = name.rpartition(".")[0]  # "" is the model itself
    return name


@contextmanager
def _recording(model: nn.Module) -> Iterator[set[str]]:
    """Record the names of the modules whose forward runs inside."""
    names = {module: name for name, module in model.named_modules()}
    called: set[str] = set()

    def record(module: nn.Module, _: Any) -> None:
        if module in names:
            called.add(names[module])

    handle = register_module_forward_pre_hook(record)
    try:
        yield called
    finally:
        handle.remove()
