"""`selfgen-ds pilot`: real runs of small models, their verdicts, and what happens to a pilot that is stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from selfgen_ds.cli import recipe_of
from selfgen_ds.config import PilotOptions, Recipe
from selfgen_ds.errors import InputError, RunFailed, Stopped
from selfgen_ds.pilot.pilot import pilot
from tests.distributed import runs
from tests.pilots import fork_the_runs

pytestmark = [pytest.mark.test, pytest.mark.timeout(400)]


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_the_runs(monkeypatch)


def _rows(path: Path, count: int = 60) -> None:
    rows = [
        {"prompt": f"q{i:03d}=", "completion": f"{i:03d}"[::-1], "kind": "even" if i % 2 == 0 else "odd"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _recipe(folder: Path, *changes: str) -> Recipe:
    if not (folder / "rows.jsonl").exists():
        _rows(folder / "rows.jsonl")
        (folder / "recipe.yaml").write_text(runs.YAML.format(folder=folder), encoding="utf-8")
    options = ("--config", str(folder / "recipe.yaml"), "--train.epochs", "1", "--train.micro_batch_size", "4")
    return recipe_of([*options, *changes])[0]


def _options(**changes: Any) -> PilotOptions:
    settings: dict[str, Any] = {"rows": 32, "held_out": 12, "seeds": 2, "jobs": 2, "evaluation": {}}
    return PilotOptions(**settings | changes)


def _document(recipe: Recipe) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((Path(recipe.output_dir) / "pilot.json").read_text(encoding="utf-8"))
    return document


def test_a_pilot_trains_every_method_at_the_budget_of_sft_and_writes_its_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(tmp_path)
    methods = ["scheduled_sampling", {"method": "bash", "temperature": 2.0, "passes": 1, "optim.loss": "dft"}]
    options = _options(methods=methods, group_by="kind", held_out=26)
    pilot(recipe, options)
    document, folder = _document(recipe), Path(recipe.output_dir)
    assert (document["baseline"], document["rows"], document["held_out"], document["seeds"]) == ("sft", 32, 26, [0, 1])
    assert {row["kind"] for row in document["by_kind"]} == {"even", "odd"}
    named = {row["method"] for row in document["verdicts"]}
    other = "bash-temperature-2.0-passes-1-optim.loss-dft"
    assert named == {"scheduled_sampling", "bash 1"}
    assert document["methods"]["bash 1"]["selfgen.temperature"] == 2.0
    assert yaml.safe_load((folder / "runs" / f"{other}-0" / "config.yaml").read_text())["optim"]["loss"] == "dft"
    assert {row["verdict"] for row in document["verdicts"]} <= {"helps", "harms", "no difference shown"}
    of_runs = document["cost"]["runs"]
    assert of_runs["sft"]["steps"] == 8
    assert all(
        run["steps"] < 8 and 0.6 < run["relative_flops"] <= 1.02 for name, run in of_runs.items() if name in named
    )
    assert document["cost"]["whole_steps"] == 15, "of 60 rows, 4 in a step"
    assert sorted(path.name for path in (folder / "runs" / "sft-0").iterdir() if path.is_dir()) == ["tensorboard"]
    assert "scheduled_sampling: " in capsys.readouterr().out
    page = (folder / "pilot.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "bash 1 (temperature 2.0, passes 1, optim.loss dft): " in page

    # started again, nothing is run or changed
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")}
    pilot(recipe, options)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")} == before
    with pytest.raises(InputError, match=r"rows: the pilot in .* was begun with 32, got 40\noutput_dir: give another"):
        pilot(recipe, _options(held_out=26, methods=methods, rows=40))
    with pytest.raises(InputError, match=r"--methods: runs of the pilot in .* were evaluated without corrections, and"):
        pilot(recipe, _options(held_out=26, methods=["rac"]))
    with pytest.raises(
        InputError, match="--metrics: --evaluation asks for no answers of the kind of sampled_3_rouge_l"
    ):
        pilot(recipe, _options(held_out=26, methods=methods, metrics=["sampled_3_rouge_l"]))
    # a setting that an older version did not have counts as its default
    record = yaml.safe_load((folder / "pilot.yaml").read_text(encoding="utf-8"))
    del record["optim.dft_share"]
    (folder / "pilot.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")
    # with another seed, only its runs are made
    pilot(recipe, _options(held_out=26, methods=["scheduled_sampling"], seeds=3))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert _document(recipe)["seeds"] == [0, 1, 2]


def test_a_folder_that_holds_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "--output_dir", str(tmp_path))
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=r"output_dir: expected an empty folder, or that of a pilot; .* has data"):
        pilot(recipe, _options())
    assert (tmp_path / "data").exists()
    assert (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("pretrained", [False, True])
def test_what_the_models_will_be_asked_is_tried_before_the_first_run(pretrained: bool, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    if pretrained:
        recipe = _recipe(tmp_path, "--model.preset", "null", "--model.tokenizer", "null")
        recipe.model.name_or_path = runs.write_model(tmp_path)
    with pytest.raises(
        InputError, match="--metrics: --evaluation asks for no answers of the kind of sampled_3_rouge_l"
    ):
        pilot(recipe, _options(metrics=["sampled_3_rouge_l"]))
    assert not (Path(recipe.output_dir) / "runs").exists()


def test_rows_without_prompts_are_refused_before_the_first_run(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "no prompt", "completion": "x"}\n' * 60, encoding="utf-8")
    with pytest.raises(InputError, match=r"rows.jsonl, line 1: field 'prompt' is missing"):
        pilot(recipe, _options(methods=["rac"]))
    assert not (Path(recipe.output_dir) / "runs").exists()


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"])
def test_a_launcher_of_several_processes_is_refused(
    tmp_path: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(tmp_path)
    monkeypatch.setenv(variable, "0")
    with pytest.raises(InputError, match="pilot: start one process on each host, without a launcher"):
        pilot(recipe, _options())


@pytest.mark.slow
def test_a_pilot_that_is_stopped_goes_on_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = _recipe(tmp_path, "--output_dir", str(tmp_path / "whole"))
    stopped = _recipe(tmp_path, "--output_dir", str(tmp_path / "stopped"))
    options = _options(seeds=1, jobs=1)
    pilot(whole, options)

    def stop() -> None:
        metrics = Path(stopped.output_dir) / "runs" / "scheduled_sampling-0" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped):
        pilot(stopped, options)
    thread.join()
    assert not (Path(stopped.output_dir) / "pilot.json").exists()
    assert (Path(stopped.output_dir) / "runs" / "sft-0" / "evaluation.json").exists()
    pilot(stopped, options)
    assert _document(stopped)["verdicts"] == _document(whole)["verdicts"]


@pytest.mark.slow
def test_a_run_that_another_process_carries_out_is_left_to_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe, options = _recipe(tmp_path), _options(jobs=1)
    folder = Path(recipe.output_dir)
    (folder / "runs").mkdir(parents=True)
    (folder / "pilot.yaml").write_text("{}\n")
    with FileLock(folder / "runs" / "sft-1.lock"), caplog.at_level("INFO", "selfgen_ds"):
        pilot(recipe, options)
    assert "1 of 4 runs are left to other processes" in caplog.text
    assert not (folder / "pilot.json").exists()
    done = {path.parent.name for path in folder.glob("runs/*/.done")}
    assert done == {"sft-0", "scheduled_sampling-0", "scheduled_sampling-1"}
    pilot(recipe, options)
    assert _document(recipe)["seeds"] == [0, 1]


@pytest.mark.slow
def test_a_method_that_fails_is_told_and_the_others_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "failing.py").write_text(
        "from selfgen_ds.methods.scheduled_sampling import ScheduledSampling\n"
        "class Failing(ScheduledSampling):\n"
        "    def contexts(self, batches, policy, step):\n"
        "        if step == 2: raise RuntimeError('out of luck')\n"
        "        return super().contexts(batches, policy, step)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = _recipe(tmp_path)
    told = r"failing-Failing: `selfgen-ds train` failed: .*out of luck.*failing-Failing-0.log.*\n.*the other methods"
    with pytest.raises(RunFailed, match=told):
        pilot(recipe, _options(methods=["failing:Failing", "scheduled_sampling"], jobs=1))
    assert {row["method"] for row in _document(recipe)["verdicts"]} == {"scheduled_sampling"}


@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        ((), {"rows": 50}, r"data.train: expected at least 62 rows \(--rows 50 and --held_out 12\), got 60"),
        ((), {"methods": ["sftt"]}, "--methods: sftt: selfgen.method: expected one of"),
        ((), {"methods": [{"method": "bash", "passes": 0}]}, "--methods: bash-passes-0: selfgen.passes: expected 1 or"),
        ((), {"methods": [{"method": "bash", "top_k": "many"}]}, "--methods: bash-top_k-many: .*many"),
        ((), {"methods": [{"method": "rac", "passes": 2}]}, "--methods: rac-passes-2: selfgen.passes: rac does not"),
        ((), {"group_by": "prompt"}, "--group_by: 12 of 12 kinds of 'prompt' have fewer than 10 held-out rows, and no"),
        (
            ("--train.epochs", "0.1"),
            {"methods": ["bash"]},
            "bash: its first step, with the round before it .* steps of sft, and .*: raise train.epochs",
        ),
        (
            (),
            {"methods": ["bash", "bash"]},
            "--methods: expected every method once, and sft not at all, got bash twice",
        ),
        ((), {"methods": ["sft"]}, "--methods: expected every method once, and sft not at all, got sft$"),
        ((), {"methods": [{"method": "bash", "depth": 3}]}, "--methods: expected names of methods, .*got depth"),
        (
            (),
            {"evaluation": {"sample_temperature": [1]}},
            "--evaluation: expected .*sample_temperatures.*, got sample_temperature",
        ),
        ((), {"evaluation": {"sample_temperatures": ["hot"]}}, "--evaluation: .*hot"),
        ((), {"evaluation": {"prefix_shares": [2.0]}}, "--evaluation: prefix_shares: expected shares from 0"),
        (
            (),
            {"group_by": "level"},
            "--group_by: expected a field of every row, got 'level'; a held-out row has prompt",
        ),
        ((), {"metrics": ["exact", "loss"]}, "--metrics: there is no metric exact"),
        ((), {"held_out": 5}, "--held_out: expected 10 or more, got 5"),
        ((), {"metrics": ["length_ratio"]}, "--metrics: length_ratio can give no verdict: neither side is better"),
        ((), {"evaluation": {"metric": "no_module:f"}}, "--evaluation: metric: .*no_module"),
        (
            (),
            {"methods": [{"method": "rac", "cue": "A"}, {"method": "rac", "cue": "B"}]},
            "--methods: expected one cue, with which `evaluate` asks for corrections",
        ),
        ((), {"seeds": 0}, "--seeds: expected 1 or more, got 0"),
        (("--resume", "auto"), {}, "resume: expected no value"),
        (("--train.micro_batch_size", "0"), {}, "train.micro_batch_size: expected 1 or more, got 0"),
    ],
)
def test_bad_input_is_told_before_the_first_run(
    changes: tuple[str, ...], options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    recipe = _recipe(tmp_path, *changes)
    with pytest.raises(InputError, match=told):
        pilot(recipe, _options(**options))
    assert not (Path(recipe.output_dir) / "runs").exists()
    assert not told.startswith("--methods") or not Path(recipe.output_dir).exists(), "nothing is loaded for these"
    record = Path(recipe.output_dir) / "pilot.yaml"
    assert not record.exists() or record.read_text() == "{}\n", "the mended command must not be refused"
