"""Schedules of the replacement probability p over training.

Bengio et al. 2015 (arXiv 1506.03099, section 2.4) decay the probability ε of feeding the *reference* token;
here p = peak * (1 - ε) grows. With i optimizer steps done and x = i / (share * total steps):

| name | ε of the paper | constants | p |
|---|---|---|---|
| `constant` | 0 | | peak |
| `linear` | max(0, k - c i) | k = 1, c = 1 / (share * total) | peak * min(x, 1) |
| `exponential` | k^i | k = 0.01^(1 / (share * total)) | peak * (1 - 0.01^x) |
| `inverse_sigmoid` | k / (k + exp(i' / k)) | k = e^6, i' = 12 k x | peak / (1 + exp(6 - 12 x)) |

so that every growing schedule starts at 1 % of `peak` or less and has reached 99 % or more at x = 1. In the last
`final_share` of the run, p is `final_probability`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from selfgen_ds.config import SelfgenConfig

_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: min(x, 1.0),
    "exponential": lambda x: 1.0 - 0.01**x,
    # In this form the argument of exp is at most 6; the form of the paper overflows in long runs.
    "inverse_sigmoid": lambda x: 1.0 / (1.0 + math.exp(6.0 - 12.0 * x)),
}


def replace_probability(config: SelfgenConfig, number: int, total: int, done: int | None = None) -> float:
    """Return p for one optimizer step, or for one round.

    Args:
        config: `replace_probability` is the peak, and `schedule_share` the share.
        number: Number of the step or round, from 0.
        total: Optimizer steps, or rounds, of the whole run.
        done: Steps or rounds that count as done in the schedule; by default those before this one.
    """
    if config.final_share and total > 1 and number >= min((1.0 - config.final_share) * total, total - 1) - 1e-9:
        return config.final_probability
    done = number if done is None else done
    return config.replace_probability * _SHAPES[config.schedule](done / (config.schedule_share * total))
