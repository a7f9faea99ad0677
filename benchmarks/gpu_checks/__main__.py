"""Run one check in this process: `python -m gpu_checks MODULE DEVICE FOLDER`, as `gpu_check.py` does."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

from gpu_checks.rows import Report


def main() -> None:
    """Run the check, and end the process with 0 if it ends without an error."""
    module, device, folder = sys.argv[1:]
    code = 1
    try:
        import_module(module).check(Report(module.rpartition(".")[2], device, Path(folder)))
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a process group that is still there could abort the interpreter's own end


if __name__ == "__main__":
    main()
