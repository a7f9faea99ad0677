"""Counter-based noise: every random number is a pure function of its keys.

The same sample gets the same noise whatever the rank, the world size, the batch shape or the number of
restarts. The mixer is splitmix64's finaliser (Steele, Lea & Flood 2014), folded over the keys; 64-bit
overflow wraps in torch on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Streams: the first key, so that the same (seed, step or round, sample, position) can serve several purposes.
REPLACE, DRAW, ROUND_REPLACE, ROUND_DRAW, ANSWER, PLAIN, EVALUATION, GENERATORS = range(1, 9)

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical right shift of int64."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def mix(bits: Tensor) -> Tensor:
    """Hash int64 values to int64 values, element by element: splitmix64's finaliser."""
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIERS[0]
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIERS[1]
    return bits ^ _shift_right(bits, 31)


def bits(*keys: int | Tensor) -> Tensor:
    """64 random bits as int64, for every combination of the broadcast int64 keys."""
    device = next((key.device for key in keys if isinstance(key, Tensor)), torch.device("cpu"))
    state = torch.as_tensor(keys[0], dtype=torch.int64, device=device)
    for key in keys[1:]:
        state = mix((state + _GOLDEN) ^ mix(torch.as_tensor(key, dtype=torch.int64, device=device) + _GOLDEN))
    return state


def uniform(*keys: int | Tensor) -> Tensor:
    """Uniform float64 in the open interval (0, 1), one for every combination of the broadcast int64 keys.

    52 random bits and a half: never 0, never rounded up to 1.

    Args:
        keys: The stream first.
    """
    return (_shift_right(bits(*keys), 12).to(torch.float64) + 0.5) * 2.0**-52
