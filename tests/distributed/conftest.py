from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selfgen_ds.config import CheckpointConfig, Recipe
from tests import faults
from tests.distributed import runs
from tests.distributed.launched import Left, launch
from tests.ranks import Ranks


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder whose file of 40 rows gives `runs.recipe` epochs of 5 steps on two ranks."""
    runs.write_rows(tmp_path)
    return tmp_path


def _saving_recipe(folder: Path) -> Recipe:
    settings = runs.recipe(folder, output_dir=str(folder / "run"), checkpoint=CheckpointConfig(every=2, keep=3))
    settings.train.max_steps = 6
    return settings


@pytest.fixture(scope="session")
def saved_once(two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run that `saved` copies."""
    folder = tmp_path_factory.mktemp("saved")
    runs.write_rows(folder)
    two_ranks.run(runs.run_training, _saving_recipe(folder))
    return folder


@pytest.fixture
def saved(saved_once: Path, folder: Path) -> Recipe:
    """Return a run of 6 steps that was saved at 2, 4, and 6. Each test gets its own copy, to resume or to damage."""
    shutil.copytree(saved_once / "run", folder / "run")
    recipe = folder / "run" / "config.yaml"
    recipe.write_text(recipe.read_text().replace(str(saved_once), str(folder)))
    return _saving_recipe(folder)


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Return what a run of two ranks, which the `deepspeed` command started, has left."""
    return launch(tmp_path_factory.mktemp("launched"))


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], faults.Whole]:
    """Return a function that gives an unbroken run by method, and trains each once."""
    folder = tmp_path_factory.mktemp("unbroken")
    runs.write_rows(folder)
    return functools.cache(lambda method: faults.whole(folder, method))
