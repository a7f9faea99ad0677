"""The order of training: which row stands at any position of an endless stream.

The order of an epoch is a function and not a list: its memory does not grow with the number of rows, and any position
can be computed without the positions before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from selfgen_ds import hashing
from selfgen_ds.errors import InputError

_ROUNDS = 6  # of the Feistel network
_SMALL = 1024
"""Most rows that are ordered by sorting random numbers. A Feistel network of so few bits can only be one of a few
permutations."""


def permute(positions: np.ndarray, size: int, *keys: int) -> np.ndarray:
    """Map positions by a pseudo-random permutation of `range(size)`, which the keys choose.

    For many rows, the permutation is a Feistel network over the next even power of two that is applied again until
    the result lies in `range(size)` (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        positions: int64 in [0, size).

    Returns:
        `[positions]` int64 in [0, size).
    """
    seeds = np.random.SeedSequence([size, *keys])
    if size <= _SMALL:
        return np.argsort(seeds.generate_state(size, np.uint64), kind="stable")[positions]
    half_bits = -(-(size - 1).bit_length() // 2)
    low = (1 << half_bits) - 1
    round_keys = seeds.generate_state(_ROUNDS, np.uint64).view(np.int64).tolist()
    result = torch.empty(len(positions), dtype=torch.int64)
    pending, values = torch.arange(len(positions)), torch.from_numpy(positions)
    while len(pending):
        left, right = values >> half_bits, values & low
        for key in round_keys:
            left, right = right, left ^ (hashing.finalize(right ^ key) & low)
        values = left << half_bits | right
        inside = values < size
        result[pending[inside]] = values[inside]
        pending, values = pending[~inside], values[~inside]
    return result.numpy()


class Stream:
    """The rows of several sources as one endless stream, epoch after epoch, each shuffled by (seed, epoch) alone.

    An epoch has as many positions as there are rows. Without weights, each row comes once per epoch. With weights,
    every source gets its share of the positions, and its rows follow each other in a shuffled order that continues
    from epoch to epoch.

    Args:
        sizes: Rows of each source.
        weights: Shares of the sources, or None.
        least: Fewest rows per epoch that a source's share may come to.

    Raises:
        InputError: The share of a source comes to fewer rows.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int, least: int = 1) -> None:
        self.size = sum(sizes)
        """Positions of an epoch."""
        self._sizes = sizes
        self._seed = seed
        self._quotas = list(sizes) if weights is None else apportion(self.size, weights)
        if weights is not None and min(self._quotas) < least:
            raise InputError(
                f"data.train: weights {weights} give a source less than one of the {self.size} rows per epoch; "
                "raise its weight"
            )
        self._ends = np.cumsum(self._quotas)
        self._starts = self._ends - self._quotas

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the source and the row at some positions of the stream.

        Args:
            positions: int64, from 0.

        Returns:
            `[positions, 2]` int64: the number of the source, and the number of the row in the source.
        """
        rows = np.empty((len(positions), 2), dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.size)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            slots = permute(offsets[here], self.size, self._seed, int(epoch))
            sources = np.searchsorted(self._ends, slots, side="right")
            rows[here, 0] = sources
            rows[here, 1] = slots - self._starts[sources]
        for source, (size, quota) in enumerate(zip(self._sizes, self._quotas, strict=True)):
            if quota != size:
                here = rows[:, 0] == source
                laps, offsets_in_lap = np.divmod(epochs[here] * quota + rows[here, 1], size)
                for lap in np.unique(laps):
                    permuted = permute(offsets_in_lap[laps == lap], size, self._seed, source, int(lap))
                    rows[np.flatnonzero(here)[laps == lap], 1] = permuted
        return rows


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` into whole shares by weight, with the method of largest remainders."""
    exact = np.array(weights) / sum(weights) * total
    shares = np.floor(exact).astype(int)
    for i in np.argsort(shares - exact, kind="stable")[: total - shares.sum()]:
        shares[i] += 1
    return shares.tolist()
