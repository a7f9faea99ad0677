"""The process of `selfgen-ds` and of `python -m selfgen_ds`: how it is stopped before it can save, and how it ends."""

from __future__ import annotations

import atexit
import os
import sys

from selfgen_ds.ranks import signals


def main() -> None:
    """`cli.main`, without the last part of the interpreter's end: gloo's threads outlive their group, and can abort it.

    Raises:
        SystemExit: With the command's exit code.
    """
    code: int | None = None

    def skip_interpreter_end() -> None:
        if code is None:
            return
        if "mpi4py.MPI" in sys.modules:
            sys.modules["mpi4py.MPI"].Finalize()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(skip_interpreter_end)  # before all others, so that it comes after them
    if "train" in sys.argv[1:3]:  # behind --local_rank, perhaps
        signals.stop_at_once()
    from selfgen_ds import cli  # slow imports

    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
        raise


if __name__ == "__main__":
    main()
