"""The order of training: any position of an endless stream of rows, without the ones before it.

Nothing here grows with the number of rows: the order of an epoch is a function, not a list.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from selfgen_ds import hashing
from selfgen_ds.errors import InputError

_ROUNDS = 6
_SMALL = 1024  # rows that are sorted by random numbers: there are too few networks of so few bits


def permute(positions: np.ndarray, size: int, *keys: int) -> np.ndarray:
    """A pseudo-random permutation of `range(size)`, another one for other keys.

    Of many rows a Feistel network over the next even power of two, walked until the result lies inside (Black &
    Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        positions: int64 in [0, size).
    """
    seeds = np.random.SeedSequence([size, *keys])
    if size <= _SMALL:
        return np.argsort(seeds.generate_state(size, np.uint64), kind="stable")[positions]
    half = -(-(size - 1).bit_length() // 2)  # bits
    low = (1 << half) - 1
    round_keys = seeds.generate_state(_ROUNDS, np.uint64).view(np.int64).tolist()
    result = torch.empty(len(positions), dtype=torch.int64)
    pending, values = torch.arange(len(positions)), torch.from_numpy(positions)
    while len(pending):
        left, right = values >> half, values & low
        for key in round_keys:
            left, right = right, left ^ (hashing.mix(right ^ key) & low)
        values = left << half | right
        inside = values < size
        result[pending[inside]] = values[inside]
        pending, values = pending[~inside], values[~inside]
    return result.numpy()


class Stream:
    """The rows of several sources as one endless stream, epoch after epoch, each shuffled by (seed, epoch) alone.

    An epoch has as many positions as there are rows. Without weights each row comes once; with weights every
    source gets its share of the positions, and goes through its own rows in a shuffled order from epoch to epoch.

    Args:
        sizes: Rows of each source.
        weights: Shares of the sources, or None.
        least: Rows an epoch that every source must come to.

    Raises:
        InputError: A share is less than that.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int, least: int = 1) -> None:
        self.size = sum(sizes)
        """Positions of an epoch."""
        self._sizes = sizes
        self._seed = seed
        self._quotas = list(sizes) if weights is None else _apportion(self.size, weights)
        if weights is not None and min(self._quotas) < least:
            raise InputError(f"data.train: a weight of {weights} is less than one of {self.size} rows an epoch")
        self._ends = np.cumsum(self._quotas)
        self._starts = self._ends - self._quotas

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Source and row, `[positions, 2]` int64, at some positions (int64, from 0) of the stream."""
        found = np.empty((len(positions), 2), dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.size)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            slots = permute(offsets[here], self.size, self._seed, int(epoch))
            sources = np.searchsorted(self._ends, slots, side="right")
            found[here, 0] = sources
            found[here, 1] = slots - self._starts[sources]
        for source, (size, quota) in enumerate(zip(self._sizes, self._quotas, strict=True)):
            if quota != size:
                here = found[:, 0] == source
                rounds, places = np.divmod(epochs[here] * quota + found[here, 1], size)
                for lap in np.unique(rounds):
                    rows = permute(places[rounds == lap], size, self._seed, source, int(lap))
                    found[np.flatnonzero(here)[rounds == lap], 1] = rows
        return found


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in shares of the weights, by largest remainders."""
    exact = np.array(weights) / sum(weights) * total
    shares = np.floor(exact).astype(int)
    for i in np.argsort(shares - exact, kind="stable")[: total - shares.sum()]:
        shares[i] += 1
    return shares.tolist()
