"""A packaged recipe or JSON is found by its name from any folder, and a mistyped path never means one."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfgen_ds import packaged
from tests.ranks import ROOT


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "recipes/demo.yaml"])
def test_a_packaged_file_is_found_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of the same name is no recipe
    assert packaged.find(name, "recipes").resolve() == ROOT / "recipes" / "demo.yaml"


def test_an_existing_file_goes_before_a_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3.json").write_text("{}")
    assert packaged.find("zero3.json", "ds_configs") == Path("zero3.json")


@pytest.mark.parametrize("name", ["mine/zero3.json", "/data/ds_configs/zero3.json", "recipes/zero3.json", "zero33"])
def test_a_path_without_a_file_means_no_packaged_one(name: str) -> None:
    assert packaged.find(name, "ds_configs") == Path(name)
