"""The largest memory that tensors take at once: of the accelerator's allocator, or counted on a CPU, exactly."""

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
    """Of this process."""

    def __init__(self) -> None:
        self._tensors = LiveTensors() if get_accelerator().device_name() == "cpu" else None

    def making(self) -> AbstractContextManager[object]:
        """Around everything that makes tensors which stay: a CPU has no allocator that knows of them."""
        return self._tensors or nullcontext()

    def during(self, action: Callable[[], object]) -> int:
        """Bytes at once while an action runs, with what stays from before."""
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
    """Follows every storage that an operation of this thread gives.

    While it is entered: `peak` bytes live at once, of storages made since the first entry; `largest` of one. Storages
    backed by a mapped file are not counted. May be entered several times; `reset` starts `peak` anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: dict[int, weakref.ref] = {}

    def reset(self) -> None:
        self.peak, self.largest = self.live, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._see(leaf, made_here=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._see(leaf, made_here=True)
        return result

    def _see(self, leaf: Any, made_here: bool) -> None:
        if not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta":
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made_here and not _mapped(storage) else 0

        def freed(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)


def _mapped(storage: torch.UntypedStorage) -> bool:
    """Whether the memory belongs to a mapped file."""
    if storage.nbytes() < 2**20:
        return False
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= storage.data_ptr() < last:
            return path.startswith("/")
    return False
