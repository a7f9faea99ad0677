"""The floating-point operations of an optimizer step, counted from its tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from selfgen_ds.config import Recipe
from selfgen_ds.engine.step import StepResult


def step_flops(recipe: Recipe, model: nn.Module) -> Callable[[StepResult], float]:
    """Return a function that counts the floating-point operations of a step on all ranks, passes and rounds included.

    A forward takes 2 operations a parameter and token, and a backward as many for the activations, and again for the
    parameters that are trained (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Activation checkpointing adds a
    forward. Attention over the context is left out, as in that source, and all experts of a mixture count.
    """
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    every, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    forwards = 3 if recipe.train.activation_checkpointing else 2  # the backward of the activations costs one
    of_learned, of_read = 2.0 * (forwards * every + trained), 2.0 * every
    return lambda result: result.tokens * of_learned + result.no_grad_tokens * of_read
