"""The installed package is complete: its recipes and DeepSpeed JSONs are found by name, from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.ranks import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow
NOT_SOURCES = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs", "tests")


def run(*command: str | Path, folder: Path, code: int = 0) -> str:
    """Run a command in a folder, and return its output and its errors."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of an environment that has the wheel, and all other packages of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=NOT_SOURCES)  # setuptools writes into its sources
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input"]
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", "dist", "./source", folder=folder)
    run(sys.executable, "-m", "venv", "--without-pip", "environment", folder=folder)
    environment = folder / "environment"
    [wheel] = (folder / "dist").glob("*.whl")
    run(*pip, "--python", environment / "bin" / "python", "install", "--no-deps", "--no-index", wheel, folder=folder)
    [packages] = environment.glob("lib/python*/site-packages")
    # This adds a folder whose own .pth files Python ignores, and with them the finder of an editable installation.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin"


def test_the_package_that_runs_is_the_wheels(programs: Path, tmp_path: Path) -> None:
    [file] = run(programs / "python", "-c", "import selfgen_ds; print(selfgen_ds.__file__)", folder=tmp_path).split()
    assert Path(file).is_relative_to(programs.parent)


def test_bench_finds_its_recipe_in_an_empty_folder(programs: Path, tmp_path: Path) -> None:
    assert "--grid" in run(programs / "selfgen-ds", "bench", "--help", folder=tmp_path)
    refused = run(programs / "selfgen-ds", "bench", "--data.max_length", "8", folder=tmp_path, code=2)
    assert "error: data.max_length: expected 16 or more" in refused  # after the recipe has been read


def test_a_recipe_and_its_json_are_found_by_name_in_an_empty_folder(programs: Path, tmp_path: Path) -> None:
    options = ["--config", "demo", "--output_dir", "run", "--rows", "1"]
    shown = run(programs / "selfgen-ds", "inspect", *options, folder=tmp_path)
    assert "builtin:sort: 65536 rows read" in shown
