"""The studies of `experiments/evidence.yaml`: every run is one that `selfgen-ds` takes, and no row is on two sides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import evidence, evidence_data, evidence_results
from experiments.evidence_study import PLAN, Study, study_of
from selfgen_ds import cli
from selfgen_ds.cli import recipe_of
from selfgen_ds.config import EvaluateOptions, to_yaml
from selfgen_ds.errors import Problems, RunFailed
from selfgen_ds.pilot import launching
from selfgen_ds.pilot.runs import StudyRun
from selfgen_ds.validation.options import check_evaluate
from selfgen_ds.validation.recipe import check_recipe
from tests.ranks import ROOT, SHARED


def _study(name: str, folder: Path) -> Study:
    return study_of(PLAN, name, folder, model=str(folder), embedding_model=str(folder))


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
    study = study_of(PLAN, "smollm2-e2e", tmp_path, str(tmp_path), str(tmp_path), scale=10)
    assert (study.plan["rows"], study.plan["steps"]) == (2400, 300)
    (arm, *_) = study.arms("test")
    assert (study.run(arm, 0, 300, "test").evaluation or {})["max_samples"] == 600
    assert PLAN["studies"]["smollm2-e2e"]["evaluation"]["max_samples"] == 60


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, StudyRun]:
    """A study, and a run of it that is trained and evaluated, as far as its settings tell."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evidence_results, "RESULTS", tmp_path / "results")
    study = _study("sort", tmp_path)
    arm = next(arm for arm in study.arms("test") if arm.name == "scheduled_sampling")
    run = study.run(arm, 0, 10, "test")
    run.folder.mkdir(parents=True)
    recipe, _ = recipe_of(["--config", run.recipe, *run.settings])
    (run.folder / "config.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    evaluated = {"settings": run.evaluation, "metrics": {"exact_match": 0.5}}
    (run.folder / "evaluation.json").write_text(json.dumps(evaluated), encoding="utf-8")
    step = {"tokens": 4, "no_grad_tokens": 0, "flops": 100.0, "step_time_s": 1.0, "drawn_tokens": 0}
    (run.folder / "metrics.jsonl").write_text(json.dumps(step) + "\n", encoding="utf-8")
    run.mark("evaluated")
    run.mark("done")
    return study, run


def test_a_finished_run_is_refused_if_the_study_has_other_settings_now(finished: tuple[Study, StudyRun]) -> None:
    study, run = finished

    def carry_out(run: StudyRun) -> None:
        evidence._carry_out(study, [run], launching.places(1, 1, []), lambda run: None, "")

    carry_out(run)
    with pytest.raises(RunFailed, match=r"was made with train.max_steps 10, and the study has 20; remove .*test"):
        carry_out(study.run(run.arm, 0, 20, "test"))
    with pytest.raises(RunFailed, match=r"was made with --sample_temperatures \[1, 1.5, 2, 2.5\], and the study has"):
        carry_out(replace(run, evaluation=(run.evaluation or {}) | {"sample_temperatures": [3]}))


def test_a_run_of_the_results_is_not_repeated_on_any_machine(finished: tuple[Study, StudyRun]) -> None:
    study, run = finished
    evidence_results.write(run, study.start | study.described(run), "sort", "test")
    (line,) = evidence_results.read("sort")
    elsewhere = _study("sort", Path("/elsewhere"))
    assert evidence._is_known(elsewhere, "test", run.arm, 0, {(run.arm.name, 0): line | {"steps": 10}})
    assert not evidence._is_known(elsewhere, "test", run.arm, 1, {(run.arm.name, 0): line})


def test_a_run_of_the_results_is_refused_if_the_study_has_another_budget_now(finished: tuple[Study, StudyRun]) -> None:
    study, run = finished
    described = study.start | study.described(run)
    line = {"steps": 10, "settings": described | {"steps": 3000}}
    with pytest.raises(
        RunFailed, match=r"was made with steps 3000, and the study has 4000; remove its line from .*sort"
    ):
        evidence._is_known(study, "test", run.arm, 0, {(run.arm.name, 0): line})


def test_sft_is_known_once_its_best_checkpoint_is(finished: tuple[Study, StudyRun]) -> None:
    study, _ = finished
    sft = next(study.arms("test"))
    run = study.run(sft, 0, 10, "test")
    line = {"steps": 10, "settings": study.start | study.described(run)}
    assert not evidence._is_known(study, "test", sft, 0, {("sft", 0): line})
    assert evidence._is_known(study, "test", sft, 0, {("sft", 0): line, ("sft-best", 0): line})


def test_the_committed_results_were_made_as_the_studies_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, part in PARTS:
        study = _study(name, Path("/elsewhere"))
        known = {(line["arm"], line["seed"]): line for line in evidence_results.read(name, part)}
        for arm in study.arms(part):
            for seed in {seed for _, seed in known}:
                if (name, part) != ("e2e", "dev"):  # made with fewer steps, as evidence.yaml says
                    evidence._is_known(study, part, arm, seed, known)
