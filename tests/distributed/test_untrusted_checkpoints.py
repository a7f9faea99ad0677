"""A resume, a conversion and an export do not run code that is in a checkpoint, unless the checkpoint is trusted."""

from __future__ import annotations

import os
import pickle
import re
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfgen_ds.checkpoint import export, manifest, universal
from selfgen_ds.config import Recipe
from selfgen_ds.errors import InputError
from selfgen_ds.setup.prepare import prepare
from tests.distributed import runs
from tests.forked import command
from tests.ranks import Ranks
from tests.tiers import matrix


class Exploit:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def infected(saved: Recipe) -> tuple[Recipe, Path, Path]:
    """Return a run whose newest checkpoint holds code, the file with the code, and the file that the code makes."""
    newest = Path(saved.output_dir) / "checkpoints" / "step-000006"
    file, made = newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt", newest.parent / "made"
    torch.save(torch.load(file, weights_only=False) | {"more": Exploit(str(made))}, file)
    write_sum(file)
    saved.resume = "auto"
    return saved, file, made


def write_sum(file: Path) -> None:
    """Write the present size and CRC-32 of a changed file into the manifest, so that the file passes its check."""
    checkpoint = manifest.complete_checkpoints(file.parent.parent)[-1]
    for files in checkpoint.files:
        if file.name in files:
            files[file.name] = [file.stat().st_size, zlib.crc32(file.read_bytes())]
    manifest.write_marker(checkpoint)


def last_lines(error: AssertionError) -> list[str]:
    """Return the last line of each failed rank's traceback."""
    return [failure.strip().splitlines()[-1] for failure in re.split(r"^rank \d: ", str(error), flags=re.MULTILINE)[1:]]


REFUSED = r"expected tensors and plain containers, found something else \(posix.system\), .*trust_checkpoint"


@matrix("number", [2, 1])
def test_code_in_a_checkpoint_is_refused_in_one_clear_line(
    one_rank: Ranks, two_ranks: Ranks, infected: tuple[Recipe, Path, Path], number: int
) -> None:
    settings, file, made = infected
    ranks = {1: one_rank, 2: two_ranks}[number]
    with pytest.raises(AssertionError) as caught:
        ranks.run(runs.first_step, settings)
    lines = last_lines(caught.value)
    assert len(lines) == number
    for line in lines:
        assert re.search(f"InputError: {file}: {REFUSED}", line)
    assert not made.exists()


def test_code_in_a_checkpoint_is_not_run_by_a_conversion_either(
    one_rank: Ranks, infected: tuple[Recipe, Path, Path]
) -> None:
    settings, _, made = infected
    with pytest.raises(AssertionError, match="UnpicklingError: Weights only load failed"):
        one_rank.run(converted, settings)
    assert not made.exists()


def converted(settings: Recipe) -> None:
    engine = prepare(replace(settings, resume=None, output_dir=settings.output_dir + "-new"), set()).engine
    with universal.converted(engine, Path(settings.output_dir) / "checkpoints" / "step-000006"):
        pass


@matrix("number", [2, 1])
def test_a_checkpoint_that_is_trusted_may_run_code(
    one_rank: Ranks, two_ranks: Ranks, infected: tuple[Recipe, Path, Path], number: int
) -> None:
    settings, _, made = infected
    settings.trust_checkpoint = True
    ranks = {1: one_rank, 2: two_ranks}[number]
    assert set(ranks.run(runs.first_step, settings)) == {6}
    assert made.exists()
    assert ranks.run(os.getenv, "TORCH_FORCE_WEIGHTS_ONLY_LOAD") == ["1"] * number
    made.unlink()
    settings.trust_checkpoint = False
    with pytest.raises(AssertionError, match="trust_checkpoint"):
        ranks.run(runs.first_step, settings)
    assert not made.exists()


def test_code_in_a_checkpoint_is_not_run_by_an_export_unless_it_is_trusted(
    infected: tuple[Recipe, Path, Path], folder: Path
) -> None:
    _, file, made = infected
    options = ["export", "--checkpoint", str(file.parent), "--output_dir", str(folder / "exported")]
    assert command(options, folder / "log") == 2
    *progress, line = (folder / "log").read_text().splitlines()
    assert re.fullmatch(f"selfgen-ds: error: {file}: {REFUSED}.*", line)
    assert all("checkpoint shards" in before for before in progress if before)  # DeepSpeed's bar, and no traceback
    assert not made.exists()
    assert not (folder / "exported").exists()
    assert command([*options, "--trust_checkpoint", "true"], folder / "log") == 0
    assert made.exists()
    assert (folder / "exported" / "model.safetensors").exists()


@matrix(
    "name",
    ["generators_rank_0.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
)
def test_a_file_that_torch_did_not_write_is_refused_too(two_ranks: Ranks, saved: Recipe, name: str) -> None:
    file = Path(saved.output_dir) / "checkpoints" / "step-000006" / name
    file.write_bytes(pickle.dumps(Exploit(str(file.parent / "made"))))
    write_sum(file)
    saved.resume = "auto"
    with pytest.raises(AssertionError) as caught:
        two_ranks.run(runs.first_step, saved)
    lines = last_lines(caught.value)
    assert len(lines) == 2
    assert all(
        re.search(f"InputError: {file}: expected tensors and plain containers, .*trust_checkpoint", line)
        for line in lines
    )
    with pytest.raises(InputError, match=f"{file}: expected tensors") if "generators" not in name else nullcontext():
        export.export_checkpoint(file.parent, file.parent.parent / "exported")
    assert not (file.parent / "made").exists()
