"""The floating-point operations of an optimizer step, counted from its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from selfgen_ds.config import Recipe
from selfgen_ds.engine.step import StepResult


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """The floating-point operations of a step on all ranks, passes and rounds included."""

    of_learned: float
    """Operations for a token that is trained on."""
    of_read: float
    """Operations for a token that a pass or a round reads without gradients."""

    def __call__(self, result: StepResult) -> float:
        """Return the operations of a step."""
        return result.tokens * self.of_learned + result.no_grad_tokens * self.of_read


def step_flops(recipe: Recipe, model: nn.Module) -> StepFlops:
    """Return what counts the operations of a step.

    A forward takes 2 operations a parameter and token, and a backward as many for the activations, and again for the
    parameters that are trained (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Activation checkpointing adds a
    forward. Attention over the context is left out, as in that source, and all experts of a mixture count.
    """
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    every, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    forwards = 3 if recipe.train.activation_checkpointing else 2  # the backward of the activations costs one
    return StepFlops(of_learned=2.0 * (forwards * every + trained), of_read=2.0 * every)
