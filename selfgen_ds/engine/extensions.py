"""Clear the locks of torch's extension builds: DeepSpeed compiles CPUAdam and asynchronous I/O at their first use."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import psutil
import torch.distributed as dist
from torch.utils.cpp_extension import get_default_build_root

from selfgen_ds.ranks import process_group

log = logging.getLogger("selfgen_ds")


def clear_stale_locks() -> None:
    """Remove build locks that no process of this host holds open.

    A killed compiler leaves its lock behind, and torch would wait for this lock without end. Collective: every rank
    must call this, so that no rank builds before the locks are cleared.
    """
    if process_group.local_rank() == 0:
        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root()))
        if locks := [*root.glob("*/lock"), *root.glob("*/*/lock")]:
            processes = psutil.process_iter(["open_files"])
            held = {file.path for process in processes for file in process.info["open_files"] or []}
            for lock in locks:
                if str(lock.resolve()) not in held:
                    log.warning("removed %s, which a killed build left behind", lock)
                    lock.unlink(missing_ok=True)
    dist.barrier()
