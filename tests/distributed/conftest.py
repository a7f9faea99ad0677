from __future__ import annotations

from pathlib import Path

import pytest

from selfgen_ds.config import CheckpointConfig, Recipe
from tests.distributed import runs
from tests.ranks import Ranks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 rows: with `runs.recipe`, 5 steps an epoch on two ranks."""
    runs.write_rows(tmp_path)
    return tmp_path


@pytest.fixture
def saved(two_ranks: Ranks, folder: Path) -> Recipe:
    """A run of 6 steps saved at 2, 4 and 6."""
    settings = runs.recipe(folder, checkpoint=CheckpointConfig(every=2, keep=3))
    settings.train.max_steps = 6
    two_ranks.run(runs.run_training, settings)
    return settings
