"""Schedules of the replacement probability p over training.

Bengio et al. 2015 (arXiv 1506.03099, section 2.4) decay the probability ε of feeding the *reference* token;
here p = peak * (1 - ε) grows. With i optimizer steps done and x = i / (share * total steps):

| name | ε of the paper | constants | p |
|---|---|---|---|
| `constant` | 0 | | peak |
| `linear` | max(0, k - c i) | k = 1, c = 1 / (share * total) | peak * min(x, 1) |
| `exponential` | k^i | k = 0.01^(1 / (share * total)) | peak * (1 - 0.01^x) |
| `inverse_sigmoid` | k / (k + exp(i' / k)) | k = e^6, i' = 12 k x | peak / (1 + exp(6 - 12 x)) |

so that every growing schedule starts at 1 % of `peak` or less and has reached 99 % or more at x = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: min(x, 1.0),
    "exponential": lambda x: 1.0 - 0.01**x,
    # in this form the argument of exp is at most 6; the form of the paper overflows in long runs
    "inverse_sigmoid": lambda x: 1.0 / (1.0 + math.exp(6.0 - 12.0 * x)),
}


def replace_probability(schedule: str, peak: float, share: float, step: int, total_steps: int) -> float:
    """Return p for one optimizer step.

    Args:
        schedule: A name of the table above.
        peak: The largest p, in [0, 1].
        share: Share of the run, in (0, 1], over which p grows.
        step: Optimizer steps already done.
        total_steps: Optimizer steps of the whole run.
    """
    return peak * _SHAPES[schedule](step / (share * total_steps))
