"""Notice a run that runs away: the model gets worse, so do its contexts, and these make the model worse still.

This happens where the target does not follow from the context. Copying a string is an example: after a wrong letter of
its own, the model is taught to go on as if the letter had been right.
"""

from __future__ import annotations

import math
from collections import deque

_WINDOW = 10  # steps whose means are compared
_RISE, _RATIO, _LOSS_RATIO = 0.2, 1.5, 1.2
_STEP_OF_P = 1.25  # means are compared at a p that is at least as large, up to this factor
_ROUND_RISE, _ROUND_RATIO = 0.05, 1.2  # smaller: a round counts the tokens of the whole data set


class Runaway:
    """Watches the share of differing tokens and the loss of a mixture.

    Each mean over ten steps is compared with the lowest earlier one at a similar or larger p: a schedule that raises p
    raises both, and is no runaway. A round is compared with the one before in the same way.
    """

    def __init__(self) -> None:
        self._last: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._lowest: dict[int, tuple[float, float]] = {}
        self._round: tuple[int, float, float] | None = None  # number, p, and share of differing tokens

    def update_round(self, number: int, probability: float, differing: float) -> str:
        """Take in the round of a step, and return what has happened if the round is worse than the one before.

        Then the watch over steps begins anew: the steps of a worse round are worse too, and p is not lowered twice.

        Args:
            number: The round, from 1.
            probability: p that it was drawn with. A round that draws nothing is not watched.
            differing: Share of the drawn tokens of the whole round that differ from the reference.
        """
        before, self._round = self._round, (number, probability, differing)
        if before is None or before[0] == number or not 0 < probability <= _STEP_OF_P * before[1]:
            return ""
        if differing <= max(before[2] + _ROUND_RISE, _ROUND_RATIO * before[2]):
            return ""
        self._begin_anew()
        told = f"{differing:.0%} of its drawn tokens differ from the reference, after {before[2]:.0%}"
        return f"round {number} is worse than the one before: {told}"

    def update(self, probability: float, differing: float, loss: float | None) -> str:
        """Take in a step, and return what has happened if the run runs away; then the watch begins anew.

        Args:
            probability: p of the step. A step that draws nothing is not watched.
            differing: Share of its drawn tokens that differ from the reference.
            loss: Its loss; None if it is no cross entropy, and the differing tokens alone are watched.
        """
        if probability <= 0 or not math.isfinite(loss or 0.0):
            return ""
        self._last.append((differing, loss or 0.0))
        if len(self._last) < _WINDOW:
            return ""
        now, now_loss = (sum(values) / _WINDOW for values in zip(*self._last, strict=True))
        level = math.floor(math.log(probability) / math.log(_STEP_OF_P))
        earlier = [lowest for other, lowest in self._lowest.items() if other >= level - 1]
        if earlier:
            before, before_loss = min(earlier)
            worse = loss is None or now_loss > _LOSS_RATIO * before_loss
            if worse and now > max(before + _RISE, _RATIO * before):
                self._begin_anew()
                told = f"{now:.0%} of the drawn tokens differ from the reference, after {before:.0%}"
                lost = "" if loss is None else f", and the loss is {now_loss:.3g}, after {before_loss:.3g}"
                return f"the run runs away: {told}{lost}"
        self._lowest[level] = min(self._lowest.get(level, (now, now_loss)), (now, now_loss))
        return ""

    def _begin_anew(self) -> None:
        self._last.clear()
        self._lowest.clear()
