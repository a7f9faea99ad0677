"""Commands in which opening chosen files fails: EACCES, EIO, EMFILE, or ENOSPC, from Python and from any library."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.ranks import ENVIRONMENT, ROOT

SOURCE = Path(__file__).with_suffix(".c")


class Commands:
    """A process with the slow imports done, which forks `selfgen-ds ARGUMENTS` with a library preloaded.

    Args:
        folder: Folder for the library.
    """

    def __init__(self, folder: Path) -> None:
        library = folder / "refused_files.so"
        compiler = ["c++", "-x", "c", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(compiler, check=True, timeout=60)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.refused_files"],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {"LD_PRELOAD": str(library)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: list[str], log: Path, variables: dict[str, str]) -> int:
        """Run a command in one process, and return its exit code; -9 if it did not end within a minute.

        Args:
            log: File for the command's output.
            variables: Variables to add to the command's environment.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([arguments, str(log), variables]) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def stop(self) -> None:
        """End the process."""
        self._server.kill()
        self._server.wait()


def opened(log: Path, inside: Path) -> set[tuple[str, str]]:
    """Return the files and folders below a folder that a command has opened: (`r`, `w`, or `d`, pattern of the path).

    Args:
        log: The file that the variable `OPENED` named.
    """
    found = set()
    for line in log.read_text(encoding="utf-8").splitlines():
        mode, _, path = line.partition(" ")
        if path.startswith(f"{inside}/"):
            # Process ids, random names, times, and hashes.
            pattern = re.sub(
                r"\b[0-9a-f]{16,}|(?<=tmp)\w{8}|\.\d+\.(?=tmp)|\d{5,}(\.[\w-]+)*", "*", path[len(str(inside)) :]
            )
            found.add((mode, pattern))
    return found


def refusing(mode: str, pattern: str, number: int) -> dict[str, str]:
    """Return the variable that lets opening a file fail with the error of this number."""
    assert errno.errorcode[number]
    return {"REFUSED": f"{mode} {pattern} {number}"}


def _serve() -> None:
    import tests.preload  # noqa: F401
    from tests.forked import _command

    for line in sys.stdin:
        arguments, log, variables = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                sys.stdin.close()
                _command(arguments, Path(log), variables)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            finally:
                os._exit(code)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.02)
        if ended == (0, 0):
            os.kill(child, 9)
            ended = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)


if __name__ == "__main__":
    _serve()
