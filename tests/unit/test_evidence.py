"""The studies of `experiments/evidence.yaml`: every run is one that `selfgen-ds` takes, and no row is on two sides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from experiments import evidence, evidence_data
from selfgen_ds import cli
from selfgen_ds.cli import recipe_of
from selfgen_ds.config import EvaluateOptions, to_yaml
from selfgen_ds.errors import Problems, RunFailed
from selfgen_ds.validation.options import check_evaluate
from selfgen_ds.validation.recipe import check_recipe
from tests.ranks import ROOT, SHARED

PLAN = yaml.safe_load((ROOT / "experiments" / "evidence.yaml").read_text(encoding="utf-8"))


def _study(name: str, folder: Path) -> evidence.Study:
    return evidence.study_of(PLAN, name, folder, model=str(folder), embedding_model=str(folder))


PARTS = [(name, part) for name in PLAN["studies"] for part in _study(name, Path()).parts]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_every_run_of_a_study_is_a_recipe_and_an_evaluation(
    name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    study = _study(name, tmp_path)
    for file in ("train", "dev", "test"):
        (tmp_path / f"{file}.jsonl").touch()
    warm_ups = study.warm_ups([0])
    runs = [*warm_ups, *(study.run(arm, 0, 10, study.split(part)) for arm in study.arms(part))]
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        train, *evaluations = run.commands
        recipe, overrides = recipe_of(train[1:])
        problems = Problems()
        check_recipe(problems, recipe)
        assert [line for line in problems.lines if "model.name_or_path" not in line] == []
        read = {name for name in overrides if name.startswith("selfgen.")}
        assert {"selfgen.method"} <= read
        assert len(evaluations) == (0 if run in warm_ups else 1), "of a warm-up, the model alone is used"
        if not evaluations:
            continue
        options = EvaluateOptions(**vars(cli._parse(*evaluations).evaluate))
        check_evaluate(problems := Problems(), options)
        assert [line for line in problems.lines if "--model" not in line] == []
        assert str(options.data).endswith((f"/{study.split(part)}", f"/{study.split(part)}.jsonl"))


def test_only_the_part_test_reads_the_test_rows(tmp_path: Path) -> None:
    for name, part in PARTS:
        study = _study(name, tmp_path)
        if part != "test":
            shown = json.dumps([study.run(arm, 0, 10, study.split(part)).commands for arm in study.arms(part)])
            assert "/test" not in shown.replace(str(tmp_path), "")


def test_the_mixtures_of_dev_differ_from_the_first_in_one_setting(tmp_path: Path) -> None:
    study = _study("sort", tmp_path)
    sft, base, *others = (arm for arm in study.arms("dev") if arm.name not in study.plan["run_dev"])
    assert sft.settings["selfgen.method"] == "sft"
    assert len(others) == sum(map(len, PLAN["varied"].values())) - len(PLAN["varied"]), "each value but that of base"
    for arm in others:
        assert sum(arm.settings[name] != value for name, value in base.settings.items()) == 1


def test_rows_of_e2e_are_split_by_meaning_representation(tmp_path: Path) -> None:
    source = SHARED / "data"
    if not source.exists():
        pytest.skip(f"{source} is absent")
    evidence_data.write_rows(tmp_path, "e2e", source, 3400)
    parts = {}
    for name in ("train", "dev", "test"):
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        parts[name] = {json.loads(line)["prompt"] for line in lines}
    assert parts["train"].isdisjoint(parts["dev"] | parts["test"])
    assert parts["dev"].isdisjoint(parts["test"])
    assert all(len(prompts) > 30 for prompts in parts.values())


def test_a_scaled_study_has_as_many_times_the_rows_and_steps(tmp_path: Path) -> None:
    study = evidence.study_of(PLAN, "smollm2-e2e", tmp_path, str(tmp_path), str(tmp_path), scale=10)
    assert (study.plan["rows"], study.plan["steps"]) == (2400, 300)
    (arm, *_) = study.arms("test")
    assert (study.run(arm, 0, 300, "test").evaluation or {})["max_samples"] == 600
    assert PLAN["studies"]["smollm2-e2e"]["evaluation"]["max_samples"] == 60


def test_a_finished_run_is_refused_if_the_study_has_other_settings_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    study = _study("sort", tmp_path)
    arm = next(arm for arm in study.arms("test") if arm.name == "scheduled_sampling")
    run = study.run(arm, 0, 10, "test")
    run.folder.mkdir(parents=True)
    recipe, _ = recipe_of(["--config", run.recipe, *run.settings])
    (run.folder / "config.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    (run.folder / "evaluation.json").write_text(json.dumps({"settings": run.evaluation}), encoding="utf-8")
    run.mark("evaluated")
    evidence._check_settings(run)
    with pytest.raises(RunFailed, match=r"was made with train.max_steps 10, and the study has 20; remove"):
        evidence._check_settings(study.run(arm, 0, 20, "test"))
    run = replace(run, evaluation=(run.evaluation or {}) | {"sample_temperatures": [3]})
    with pytest.raises(RunFailed, match=r"was made with --sample_temperatures \[1, 1.5, 2, 2.5\], and the study has"):
        evidence._check_settings(run)
