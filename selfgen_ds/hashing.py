"""Counter-based random numbers: each one is a hash of its keys and depends on nothing else.

The module has no state: the same keys give the same number on every rank and device, in every batch shape and after
every restart. It serves the noise of draws (`selfgen_ds.methods`), the sampled answers of an evaluation, and the order
of training (`selfgen_ds.data.order`). The hash is the finalizer of splitmix64 (Steele, Lea & Flood 2014, "Fast
splittable pseudorandom number generators"), folded over the keys. Overflow of int64 wraps in torch on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The first key names the purpose, so that one seed, step or round, sample, and position can serve several purposes.
REPLACE, DRAW, ROUND_REPLACE, ROUND_DRAW, ANSWER, SFT_SHARE, EVALUATION, GENERATORS = range(1, 9)
CLEAN, SPAN, NOISE = range(9, 12)

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _shift_right(values: Tensor, count: int) -> Tensor:
    """Shift int64 values to the right and fill with zeros; torch's own shift keeps the sign."""
    return (values >> count) & ((1 << (64 - count)) - 1)


def finalize(values: Tensor) -> Tensor:
    """Hash int64 values to int64 values, element by element: the finalizer of splitmix64, which is a bijection."""
    values = (values ^ _shift_right(values, 30)) * _MULTIPLIERS[0]
    values = (values ^ _shift_right(values, 27)) * _MULTIPLIERS[1]
    return values ^ _shift_right(values, 31)


def bits(*keys: int | Tensor) -> Tensor:
    """Return 64 random bits as int64, for every combination of the broadcast int64 keys."""
    device = next((key.device for key in keys if isinstance(key, Tensor)), torch.device("cpu"))
    state = torch.as_tensor(keys[0], dtype=torch.int64, device=device)
    for key in keys[1:]:
        state = finalize((state + _GOLDEN) ^ finalize(torch.as_tensor(key, dtype=torch.int64, device=device) + _GOLDEN))
    return state


def uniform(*keys: int | Tensor) -> Tensor:
    """Return uniform float64 values in the open interval (0, 1), one for every combination of the broadcast keys.

    A value has 52 random bits and a half: it is never 0 and is never rounded up to 1.

    Args:
        keys: int64; the purpose comes first.
    """
    return (_shift_right(bits(*keys), 12).to(torch.float64) + 0.5) * 2.0**-52
