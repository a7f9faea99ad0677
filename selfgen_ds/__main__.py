"""Entry point of `selfgen-ds` and `python -m selfgen_ds`: signals during slow imports, and the exit of the process."""

from __future__ import annotations

import atexit
import os
import sys

from selfgen_ds.ranks import environment, signals


def main() -> None:
    """Run `cli.main`, then exit without the last part of the interpreter's shutdown.

    Raises:
        SystemExit: The command has failed, with its exit code.
    """
    code: int | None = None

    def skip_interpreter_end() -> None:
        # Threads of gloo outlive their process group. A thread that waits for the interpreter's lock
        # while the interpreter shuts down aborts the process (SIGABRT), and the launcher counts a run that has done all
        # its work as failed. So the process exits here, after all other exit handlers.
        if code is None:
            return  # an unexpected exception, after which the interpreter exits with code 1
        if "mpi4py.MPI" in sys.modules:
            sys.modules["mpi4py.MPI"].Finalize()  # without it, mpirun reports a rank that ended abnormally
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(skip_interpreter_end)  # handlers run in reverse order: the first one registered runs last
    if {"train", "pilot", "probe"} & set(
        sys.argv[1:3]
    ):  # the `deepspeed` launcher may put --local_rank before the sub-command
        signals.stop_at_once()
    if "pilot" not in sys.argv[1:2]:  # which gives each of its runs a share of this host
        environment.set_defaults(os.environ)
    from selfgen_ds import cli  # imports torch and DeepSpeed, which takes seconds

    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
        raise


if __name__ == "__main__":
    main()
