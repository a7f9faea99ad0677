"""The checks of a run's inputs: before the rows are read, and after that; the problems of each stage come together."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from selfgen_ds.checkpoint.storage import Storage
from selfgen_ds.config import DataConfig, Recipe, SelfgenConfig, Source, TrainConfig
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.setup import prepare
from selfgen_ds.setup.inputs import load_data
from selfgen_ds.setup.run_folder import RunFolder
from tests.distributed import runs


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "raise_on_all_ranks", nullcontext)
    monkeypatch.setattr(prepare.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(prepare.dist, "get_rank", lambda: 0)


def _recipe(folder: Path, method: str, train: TrainConfig, **data: object) -> Recipe:
    row = json.dumps({"prompt": "What is it? ", "completion": "It is this."}) + "\n"
    (folder / "rows.jsonl").write_text(row * 4)
    settings: dict = {"train": str(folder / "rows.jsonl"), "max_length": 32} | data
    return runs.recipe(folder, data=DataConfig(**settings), selfgen=SelfgenConfig(method=method), train=train)


def _folder(recipe: Recipe, shared: bool = True) -> RunFolder:
    storage = Storage(shared=shared, writes=True)
    return RunFolder(path=Path(recipe.output_dir), storage=storage, resumed=None, lock=None)


def _problems_of_the_plan(recipe: Recipe) -> list[str]:
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError) as caught:
        prepare._plan(recipe, tokenizer, load_data(recipe, tokenizer), _folder(recipe))
    return str(caught.value).splitlines()


def test_hosts_without_a_shared_folder_are_refused_for_rounds_before_any_row_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(prepare, "load_samples", lambda *_: pytest.fail("rows are read"))
    recipe = _recipe(tmp_path, "bash", TrainConfig(max_steps=1, micro_batch_size=1), max_length=10**6)
    with pytest.raises(InputError) as caught:
        prepare._load_inputs(recipe, _folder(recipe, shared=False), stage=3, today="2026-01-31")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("data.max_length: expected at most the model's ")
    assert lines[1:] == [
        "output_dir: expected a folder that all hosts share, because bash writes rounds there; the hosts do not share "
        f"{recipe.output_dir}"
    ]


def test_a_method_without_rounds_needs_no_shared_folder(tmp_path: Path) -> None:
    problems = prepare.Problems()
    recipe = _recipe(tmp_path, "scheduled_sampling", TrainConfig(max_steps=1, micro_batch_size=1))
    prepare.check_rounds_folder(problems, recipe, _folder(recipe, shared=False).storage)
    assert problems.lines == []


def test_epochs_rounds_and_what_the_method_refuses_are_reported_together(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "rac", TrainConfig(epochs=0.1, micro_batch_size=5))
    lines = _problems_of_the_plan(recipe)
    assert lines[:2] == [
        "train.epochs: 0.1 epochs of 4 rows contain no whole row; raise train.epochs",
        "selfgen.epochs_per_round: a round of 4 rows is less than a step of 5; raise it, "
        "or lower train.rows_per_step, train.micro_batch_size or train.gradient_accumulation_steps",
    ]
    assert [line.split(":")[0] for line in lines[2:]] == ["data.max_length"]


def test_a_weight_of_less_than_a_row_is_refused(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "sft", TrainConfig(max_steps=1, micro_batch_size=1))
    path = str(tmp_path / "rows.jsonl")
    recipe.data.train = [Source(path=path, weight=weight) for weight in (1.0, 1000.0)]
    lines = _problems_of_the_plan(recipe)
    what = "weights [1.0, 1000.0] give a source less than one of the 8 rows per epoch"
    assert lines == [f"data.train: {what}; raise its weight"]
