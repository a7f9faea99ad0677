"""Huszar 2015 (arXiv 1511.05101): if the answer is not a function of the prompt, the mixed objective is biased."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfgen_ds import hashing
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods.method import Policy
from selfgen_ds.methods.mixture import mix, replacement_mask
from tests.batches import padded

ROWS, STEPS, LEARNING_RATE = 2000, 150, 4.0


pytestmark = pytest.mark.test  # two models are trained for it


class TabularModel(Policy):
    """A model of p(y1) and p(y2 | c1) over the tokens 0 and 1."""

    def __init__(self) -> None:
        self.first = torch.zeros(2, requires_grad=True)
        self.second = torch.zeros(2, 2, requires_grad=True)

    def draw(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        probability_of_0 = self.first.detach().softmax(0)[0]
        return [(u > probability_of_0).long() for u in uniforms]

    def loss(self, context: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss over rows of `prompt y1 y2`."""
        first = F.cross_entropy(self.first.expand(len(target), 2), target[:, 1])
        return first + F.cross_entropy(self.second[context[:, 1]], target[:, 2])


@pytest.mark.parametrize(("replaced", "optimum"), [(0.5, 0.75), (0.0, 1.0), (1.0, 0.5)])
def test_the_second_token_follows_the_first_with_1_minus_half_the_replaced_share(
    replaced: float, optimum: float
) -> None:
    # y is 00 or 11; the last token is never replaced, so that only the first one can be
    batch = padded([[0]] * ROWS, [[row % 2, row % 2] for row in range(ROWS)], list(range(ROWS)))
    model = TabularModel()
    for step in range(STEPS):
        mask = replacement_mask(batch, replaced, (hashing.REPLACE, 0, step))
        (mixed,), _ = mix([batch], model, [mask], 1, (hashing.DRAW, 0, step))
        gradients = torch.autograd.grad(model.loss(mixed.context_ids, mixed.target_ids), [model.first, model.second])
        with torch.no_grad():
            model.first -= LEARNING_RATE * gradients[0]
            model.second -= LEARNING_RATE * gradients[1]
    follows = model.second.softmax(1).diagonal()
    assert follows.tolist() == pytest.approx([optimum, optimum], abs=0.02)
