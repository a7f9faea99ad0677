"""The micro-batches of the next step, made in a thread while the model takes this one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from selfgen_ds.data.batches import StepBatches, TokenBatch


class Prefetch:
    """Reads and pads the rows of a step before they are asked for, so that no step waits for the disk."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: dict[tuple[StepBatches, int], Future[list[TokenBatch]]] = {}

    def at(self, step_batches: StepBatches, step: int, more: bool) -> Future[list[TokenBatch]]:
        """Return this rank's micro-batches of a step, and have those of the next one made.

        Args:
            step: Optimizer step, from 0.
            more: Whether the next step takes its rows from the same batches, as the first step of a round does not.
        """
        batches = self._ahead.pop((step_batches, step), None) or self._thread.submit(step_batches.at, step)
        if more:
            self._ahead = {(step_batches, step + 1): self._thread.submit(step_batches.at, step + 1)}
        return batches
