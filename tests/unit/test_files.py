"""What is said of a file that the operating system refuses, and which files count as damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from selfgen_ds.errors import InputError
from selfgen_ds.files import damaged, naming, refusal, sync_and_sum, write_atomically

FULL = Path("/dev/full")  # a file that can be opened, and not written


def error(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (error(errno.ENOSPC, "/data/x"), "/data/x: No space left on device; free some space there"),
        (error(errno.ENOENT, "/data/x"), "/data/x: No such file or directory"),
        (error(errno.ETIMEDOUT, "/nfs/x"), "/nfs/x: Connection timed out"),
        (Exception("I/O error: No space left (os error 28)"), "No space left on device; free some space there"),
        (OSError("/data/x could not\nbe written"), "/data/x could not be written"),
        (error(errno.ECONNRESET), None),
        (ValueError("x"), None),
    ],
    ids=str,
)
def test_a_refused_file_is_a_line_with_what_to_do_and_any_other_error_is_not(
    given: Exception, line: str | None
) -> None:
    assert refusal(given) == line
    wrapped = RuntimeError("a library's own words")
    wrapped.__cause__ = given
    assert refusal(wrapped) == line


def test_an_error_that_names_no_file_gets_the_name_of_the_block_and_keeps_a_name_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, naming(tmp_path), open(FULL, "wb", 0) as file:
        file.write(b"x")
    assert refusal(caught.value) == f"{tmp_path}: No space left on device; free some space there"
    with pytest.raises(OSError, match="No such file") as caught, naming(tmp_path):
        (tmp_path / "absent").read_text()
    assert refusal(caught.value) == f"{tmp_path}/absent: No such file or directory"
    with pytest.raises(OSError, match="No such file") as caught, naming(tmp_path):
        save_file({"a": torch.zeros(9)}, tmp_path / "no folder" / "x")
    assert str(refusal(caught.value)).startswith(f"{tmp_path}: ")


def test_a_line_about_the_input_stays_as_it_is() -> None:
    with pytest.raises(InputError, match=r"^rows\.jsonl: cannot be read$"), naming("the cache"):
        raise InputError("rows.jsonl: cannot be read") from error(errno.EIO)


def test_files_are_damaged_if_they_are_missing_changed_or_refused(tmp_path: Path) -> None:
    files = {}
    for name in ("whole", "changed", "missing", "refused"):
        write_atomically(tmp_path / name, "content")
        files[name] = sync_and_sum(tmp_path / name)
    (tmp_path / "changed").write_text("CONTENT")
    (tmp_path / "missing").unlink()
    (tmp_path / "refused").unlink()
    (tmp_path / "refused").symlink_to("refused")  # permissions do not stop root, a loop of links does
    assert damaged(tmp_path, files) == ["changed", "missing", "refused"]
    assert damaged(tmp_path / "no folder", {"whole": files["whole"]}) == ["whole: No such file or directory"]
