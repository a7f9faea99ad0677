"""Peak memory of tensors: from the accelerator's allocator, or counted exactly on a CPU, which has no such record."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory:
    """Peak memory of this process's tensors, in bytes."""

    def __init__(self) -> None:
        self._tensors = LiveTensors() if get_accelerator().device_name() == "cpu" else None

    def counting(self) -> AbstractContextManager[object]:
        """Count the tensors made inside the context.

        Enter the context around all code whose tensors outlive the code, because a CPU has no record of them.
        """
        return self._tensors or nullcontext()

    def during(self, action: Callable[[], object]) -> int:
        """Run an action, and return the most bytes alive at once, with the tensors counted before."""
        gc.collect()
        if self._tensors is not None:
            self._tensors.reset()
            with self._tensors:
                action()
            return self._tensors.peak
        get_accelerator().reset_peak_memory_stats()
        action()
        return get_accelerator().max_memory_allocated()


class LiveTensors(TorchDispatchMode):
    """Count the storages that operations of this thread return while the mode is entered.

    `live` is the bytes alive now, `peak` the most bytes alive at once, and `largest` the bytes of the largest storage.
    Storages that were made outside the mode, and those backed by a mapped file, do not count. The mode may be entered
    several times, and continues to count; `reset` starts `peak` and `largest` anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: dict[int, weakref.ref] = {}

    def reset(self) -> None:
        """Start `peak` at the bytes alive now, and `largest` at 0."""
        self.peak, self.largest = self.live, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._count(leaf, is_new=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._count(leaf, is_new=True)
        return result

    def _count(self, leaf: Any, is_new: bool) -> None:
        """Count the storage of a tensor when it is first seen; an argument's was made outside the mode."""
        if not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta":
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if is_new and not _mapped(storage) else 0

        def freed(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)


def _mapped(storage: torch.UntypedStorage) -> bool:
    """Return whether a storage lies in a mapped file, according to Linux's list of the process's memory."""
    if storage.nbytes() < 2**20:  # reading the list for every small tensor would take too long
        return False
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= storage.data_ptr() < last:
            return path.startswith("/")
    return False
