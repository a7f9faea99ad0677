"""Commands in which opening chosen files fails: EACCES, EIO, EMFILE, or ENOSPC, from Python and from any library."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

from tests.ranks import ENVIRONMENT, ROOT

SOURCE = Path(__file__).with_suffix(".c")
_VARYING = re.compile(r"\b[0-9a-f]{16,}|(?<=tmp)\w{6,8}|(?<=\.)\d+(?=\.tmp)|(?<=tfevents\.).*|(?<=-)\d{5,}")
"""Hashes, random names, process ids, steps, and times in paths."""


class Commands:
    """A process with the slow imports done, which forks `selfgen-ds ARGUMENTS` with a library preloaded.

    Args:
        folder: Folder for the library.
        variables: Variables to add to the environment of the process and of all commands.
    """

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        library = folder / "refused_files.so"
        compiler = ["c++", "-x", "c", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(compiler, check=True, timeout=60)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.refused_files"],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | variables | {"LD_PRELOAD": str(library)},
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
    """Return the files and folders below a folder that a command has opened.

    Args:
        log: The file that the variable `OPENED` named.

    Returns:
        Pairs of `r` (read), `w` (written), or `d` (listed), and a pattern of the path below the folder.
    """
    found = set()
    for line in log.read_text(encoding="utf-8").splitlines():
        mode, _, path = line.partition(" ")
        if path.startswith(f"{inside}/"):
            found.add((mode, _VARYING.sub("*", path.removeprefix(str(inside)))))
    return found


def refusing(mode: str, pattern: str, number: int) -> dict[str, str]:
    """Return the variable that lets opening the files that match a pattern fail with the error of this number."""
    return {"REFUSED": f"{mode} {pattern} {number}"}


def _serve() -> None:
    import tests.preload  # noqa: F401
    from tests.forked import _command

    for line in sys.stdin:
        arguments, log, variables = json.loads(line)
        process = get_context("fork").Process(target=_command, args=(arguments, Path(log), variables))
        process.start()
        process.join(60.0)
        process.kill()
        process.join()
        print(process.exitcode, flush=True)


if __name__ == "__main__":
    _serve()
