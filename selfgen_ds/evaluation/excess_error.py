"""Excess accumulated errors: how much worse a model does after its own tokens than after the reference's, to an oracle.

With a model p, an oracle o (a better model of the same tokens), and d(c) = KL(o(.|c) || p(.|c)) after a context c
(Arora et al. 2022, arXiv 2204.01171, section 3):

    R(l)        = sum_{t <= l} E d(c_<t)     contexts that the model has sampled itself
    eps(l)      = 1/l sum_{t <= l} E d(y_<t) contexts of the reference
    ExAccErr(l) = (R(l) / (l eps(l)) - 1) * 100 %

Errors that do not feed on each other give 0 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfgen_ds.data.batches import collate
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.model.cross_entropy import Projection
from selfgen_ds.model.policy import EnginePolicy

_CHUNK = 128  # positions whose distributions exist at the same time


@torch.no_grad()
def divergences(policy: EnginePolicy, oracle: EnginePolicy, rows: list[TrainingRow]) -> list[list[float]]:
    """Return KL(oracle || policy) in nats at every target of some rows, given the context before it.

    Args:
        policy, oracle: Models whose weights are whole on this rank.
    """
    if not rows:
        return []
    batch = collate([[row] for row in rows])
    parts = [one.hidden_states(batch) for one in (policy, oracle)]
    (hidden, project), (oracle_hidden, oracle_project) = parts
    chunks = zip(hidden.split(_CHUNK), oracle_hidden.split(_CHUNK), strict=True)
    found = [_kl(ours, theirs, project, oracle_project) for ours, theirs in chunks]
    sizes = batch.loss_mask.sum(dim=1).tolist()
    return [values.tolist() for values in torch.cat(found).cpu().split(sizes)]


def _kl(hidden: Tensor, oracle_hidden: Tensor, project: Projection, oracle_project: Projection) -> Tensor:
    """Return KL(oracle || model) at some positions: `[N]` float32.

    The heads of two sizes of a model may be padded to other widths; what is beyond the smaller one is no token.
    """
    logits, oracle_logits = project.logits(hidden).float(), oracle_project.logits(oracle_hidden).float()
    size = min(logits.shape[-1], oracle_logits.shape[-1])
    ours, theirs = logits[:, :size].log_softmax(dim=-1), oracle_logits[:, :size].log_softmax(dim=-1)
    return (theirs.exp() * (theirs - ours)).sum(dim=-1)
