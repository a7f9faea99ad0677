"""Code in a checkpoint is not run: not by a resume, a conversion or an export, unless it is trusted."""

from __future__ import annotations

import os
import pickle
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfgen_ds.checkpoint import checkpoint, universal, unpickling
from selfgen_ds.config import Recipe
from selfgen_ds.setup.prepare import prepare
from tests.distributed import runs
from tests.forked import command
from tests.ranks import Ranks


class Exploit:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def infected(saved: Recipe) -> tuple[Recipe, Path, Path]:
    """A run whose newest checkpoint holds code, in a file that is otherwise as it was: the file, and what it makes."""
    newest = Path(saved.output_dir) / "checkpoints" / "step-000006"
    file, made = newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt", newest.parent / "made"
    torch.save(torch.load(file, weights_only=False) | {"more": Exploit(str(made))}, file)
    found = vars(checkpoint.complete_checkpoints(newest.parent)[-1])
    found["files"][1][file.name] = [file.stat().st_size, zlib.crc32(file.read_bytes())]
    checkpoint.write_marker(newest, {name: value for name, value in found.items() if name != "path"})
    saved.resume = "auto"
    return saved, file, made


REFUSED = r"expected tensors and plain containers, found something else \(posix.system\), .*trust_checkpoint"


@pytest.mark.parametrize("number", [1, 2])
def test_code_in_a_checkpoint_is_refused_in_one_clear_line(
    one_rank: Ranks, two_ranks: Ranks, infected: tuple[Recipe, Path, Path], number: int
) -> None:
    settings, file, made = infected
    ranks = {1: one_rank, 2: two_ranks}[number]
    with pytest.raises(AssertionError) as caught:
        ranks.run(runs.first_step, settings)
    lines = [line for line in str(caught.value).splitlines() if "InputError: " in line]
    assert len(lines) == number
    assert re.search(f"InputError: {file}: {REFUSED}", lines[0])
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


@pytest.mark.parametrize("number", [1, 2])
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
    lines = (folder / "log").read_text().splitlines()
    assert len(lines) == 1
    assert re.fullmatch(f"selfgen-ds: error: {file}: {REFUSED}.*", lines[0])
    assert not made.exists()
    assert not (folder / "exported").exists()
    assert command([*options, "--trust_checkpoint", "true"], folder / "log") == 0
    assert made.exists()
    assert (folder / "exported" / "model.safetensors").exists()


def test_a_file_that_torch_did_not_write_is_refused_too(saved: Recipe) -> None:
    file = Path(saved.output_dir) / "checkpoints" / "step-000006" / "generators_rank_0.pt"
    assert unpickling.refused([file]) == []
    file.write_bytes(pickle.dumps(Exploit(str(file.parent / "made"))))
    assert len(unpickling.refused([file])) == 1
    assert not (file.parent / "made").exists()
