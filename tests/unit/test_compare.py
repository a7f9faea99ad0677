"""`compare`: the means, the intervals, which runs form one row, and what is refused."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from selfgen_ds import compare
from selfgen_ds.comparison.runs import load_run
from selfgen_ds.config import (
    CompareOptions,
)
from selfgen_ds.errors import InputError
from tests.evaluated import run_folder

KEYS = {
    *("run", "label", "method", "seeds", "metric", "mean", "low", "high"),
    *("paired_difference", "paired_low", "paired_high", "p", "p_corrected", "verdict", "counted", "seeds_known"),
}


def _compare(tmp_path: Path, *runs: str) -> list[dict[str, Any]]:
    compare.run(CompareOptions(runs=list(runs), output_dir=str(tmp_path / "out")))
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    return [row for row in rows if row["metric"] != "loss"]


BASELINE, BETTER = [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison of two runs, with the values `BASELINE` and `BETTER`."""

    folder: Path
    baseline: str
    better: str
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("comparison")
    baseline = run_folder(folder / "a", BASELINE)
    better = run_folder(folder / "b", BETTER, method="bash")
    rows = _compare(folder, baseline, better)
    return Comparison(folder=folder / "out", baseline=baseline, better=better, rows=rows)


def test_table_json_and_plot_are_written(comparison: Comparison) -> None:
    names = {f"comparison.{kind}" for kind in ("html", "json", "md", "png")}
    assert {path.name for path in comparison.folder.iterdir()} == names
    assert (comparison.folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_json_has_the_documented_keys(comparison: Comparison) -> None:
    document = json.loads((comparison.folder / "comparison.json").read_text())
    assert document.keys() == {"baseline", "budgets", "runs", "rows"}
    assert document["baseline"] == comparison.baseline
    assert all(row.keys() >= KEYS for row in comparison.rows)


def test_every_run_has_a_row_with_its_mean(comparison: Comparison) -> None:
    assert [(r["run"], r["method"], r["seeds"], r["metric"], r["mean"]) for r in comparison.rows] == [
        (comparison.baseline, "sft", [0], "exact_match", 0.5),
        (comparison.better, "bash", [0], "exact_match", 0.75),
    ]


def test_the_difference_is_to_the_first_run(comparison: Comparison, tmp_path: Path) -> None:
    first, second = comparison.rows
    assert second["paired_difference"] == 0.25
    assert (first["paired_difference"], first["paired_low"], first["paired_high"]) == (None, None, None)
    assert _compare(tmp_path, comparison.better, comparison.baseline)[1]["paired_difference"] == -0.25


def test_the_table_shows_mean_and_difference(comparison: Comparison) -> None:
    table = (comparison.folder / "comparison.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| exact_match |"))
    assert "| 0.500 [" in line
    assert "| 0.750 [" in line
    assert "(+0.250 [" in line


def test_the_interval_of_a_constant_has_no_width(tmp_path: Path) -> None:
    (row,) = _compare(tmp_path, run_folder(tmp_path / "a", [0.25] * 8))
    assert (row["low"], row["high"]) == (0.25, 0.25)


def test_a_share_that_is_0_on_all_rows_may_be_more_on_others(tmp_path: Path) -> None:
    (row,) = _compare(tmp_path, run_folder(tmp_path / "a", [0.0] * 8))
    assert row["low"] == pytest.approx(0.0, abs=1e-9)
    assert 0.3 < row["high"] < 0.35


def test_a_difference_that_is_the_same_on_every_row_is_certain(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4, 100) / 8
    a = run_folder(tmp_path / "a", values.tolist())
    b = run_folder(tmp_path / "b", (values + 0.5).tolist(), method="bash")
    row = _compare(tmp_path, a, b)[1]
    assert [row["paired_low"], row["paired_difference"], row["paired_high"]] == pytest.approx([0.5] * 3, abs=1e-12)
    assert row["high"] - row["low"] > 0.05


def test_rows_with_one_prompt_are_one_in_the_intervals(tmp_path: Path) -> None:
    """Each answer ten times, to the same prompt, tells no more than once."""
    found = []
    for name, times in (("once", 1), ("ten times", 10)):
        (folder := tmp_path / name).mkdir()
        values = np.random.default_rng(0).integers(0, 2, (2, 40)).repeat(times, axis=1).astype(float).tolist()
        a = run_folder(folder / "a", values[0], rows_of_a_prompt=times)
        b = run_folder(folder / "b", values[1], rows_of_a_prompt=times, method="bash")
        found.append(_compare(folder, a, b)[1])
    assert found[0]["counted"] == found[1]["counted"] == 40
    for name in ("mean", "low", "high", "paired_difference", "paired_low", "paired_high", "p"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-6), name


def test_rows_without_a_prompt_are_not_taken_as_one(tmp_path: Path) -> None:
    folder = Path(run_folder(tmp_path / "a", [0.0, 1.0] * 10))
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    (folder / "predictions.jsonl").write_text(re.sub(r'"prompt": "p\d+"', '"prompt": ""', text), encoding="utf-8")
    assert load_run(folder)["scores"].prompts.tolist() == list(range(20))


def test_runs_that_differ_in_the_seed_alone_are_one_row_whose_interval_covers_their_spread(tmp_path: Path) -> None:
    a, b = (run_folder(tmp_path / f"{seed}", [float(seed)] * 4, seed=seed) for seed in (0, 1))
    (row,) = _compare(tmp_path, a, b)
    assert (row["run"], row["seeds"], row["mean"]) == (a, [0, 1], 0.5)
    assert (row["low"], row["high"]) == (0.0, 1.0)  # of two seeds, Student's interval is wider than all shares


def test_seeds_that_started_from_different_models_are_one_row(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / f"{seed}", BASELINE, seed=seed, model=f"warm-up-{seed}") for seed in (0, 1)]
    assert [row["seeds"] for row in _compare(tmp_path, *runs)] == [[0, 1]]


def test_a_run_that_was_made_before_a_setting_existed_has_its_default(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / f"{seed}", BASELINE, seed=seed) for seed in (0, 1, 2)]
    recipes = [yaml.safe_load((Path(run) / "config.yaml").read_text()) for run in runs]
    del recipes[0]["optim"]["dft_share"]
    recipes[2]["optim"]["dft_share"] = 0.5
    for run, recipe in zip(runs, recipes, strict=True):
        (Path(run) / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert [row["seeds"] for row in _compare(tmp_path, *runs)] == [[0, 1], [2]]


def test_runs_of_another_method_or_dtype_or_from_another_model_with_the_same_seed_are_rows_of_their_own(
    tmp_path: Path,
) -> None:
    runs = [
        run_folder(tmp_path / "a", BASELINE),
        run_folder(tmp_path / "b", BASELINE, method="bash", seed=1),
        run_folder(tmp_path / "c", BASELINE, dtype="bfloat16", seed=2),
        run_folder(tmp_path / "d", BASELINE, model="8B"),
    ]
    assert [row["run"] for row in _compare(tmp_path, *runs)] == runs


@pytest.mark.parametrize("method", ["sft", "bash"])
def test_runs_evaluated_on_different_rows_are_an_error_that_names_both(tmp_path: Path, method: str) -> None:
    a = run_folder(tmp_path / "a", BASELINE)
    b = run_folder(tmp_path / "b", BASELINE, method=method, seed=1, first_sample_id=1)
    with pytest.raises(InputError, match="different rows") as caught:
        _compare(tmp_path, a, b)
    assert a in str(caught.value)
    assert b in str(caught.value)


def test_runs_evaluated_on_different_data_are_an_error(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", BASELINE)
    b = run_folder(tmp_path / "b", BASELINE, method="bash", data="other.jsonl")
    with pytest.raises(InputError, match=r"with data 'other\.jsonl' and 'test\.jsonl'"):
        _compare(tmp_path, a, b)
    assert not (tmp_path / "out").exists()


FILES = pytest.mark.parametrize("name", ["config.yaml", "evaluation.json", "predictions.jsonl"])


@FILES
def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    run = run_folder(tmp_path / "a", BASELINE)
    (tmp_path / "a" / name).unlink()
    if name == "config.yaml":  # a base model has none
        (row,) = _compare(tmp_path, run)
        assert (row["label"], row["method"], row["seeds"], row["mean"]) == (run, "", [], 0.5)
        return
    with pytest.raises(InputError, match=f"^{run}/{name}: missing"):
        _compare(tmp_path, run)


def test_the_loss_is_a_mean_over_tokens_whose_interval_covers_its_rows(tmp_path: Path) -> None:
    losses = [(1.0, 1), (3.0, 3), (1.0, 4), (2.0, 8)]
    run = run_folder(tmp_path / "a", [1.0] * 4, losses=losses)
    better = run_folder(tmp_path / "b", [1.0] * 4, method="bash", losses=[(loss - 0.5, n) for loss, n in losses])
    _compare(tmp_path, run, better)
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    first, second = (row for row in rows if row["metric"] == "loss")
    assert first["mean"] == pytest.approx(30 / 16)
    assert first["low"] < 30 / 16 < first["high"]
    assert second["paired_difference"] == pytest.approx(-0.5)
    assert (second["paired_low"], second["paired_high"]) == pytest.approx((-0.5, -0.5)), "paired by row"


def test_every_bad_folder_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError) as caught:
        _compare(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        f"{tmp_path}/{name}/evaluation.json" for name in ("a", "b")
    ]


@FILES
def test_a_broken_file_is_an_error_that_names_the_run(tmp_path: Path, name: str) -> None:
    run = run_folder(tmp_path / "a", BASELINE)
    (tmp_path / "a" / name).write_text('{"cut": [off')
    with pytest.raises(InputError, match=f"^{run}"):
        _compare(tmp_path, run)


def test_a_run_that_is_given_twice_is_an_error_by_whatever_path(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "run", [0.5]), str(tmp_path / "run" / ".." / "run")]
    with pytest.raises(InputError, match=r"^runs: \S+/run is given twice$"):
        _compare(tmp_path, *runs)


def test_a_run_without_predictions_is_an_error_that_names_it(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "a", BASELINE)
    (tmp_path / "a" / "predictions.jsonl").write_text("")
    with pytest.raises(InputError, match=f"^{run}"):
        _compare(tmp_path, run)


CORRECTED = [f"corrected_1_{name}" for name in ("exact_match", "wrong_to_right", "right_to_wrong", "unchanged")]


def _with_corrections(folder: str, values: list[float], cue: str | None = None) -> str:
    """Rewrite the run's evaluation as one with a round of correction, and return the folder."""
    path = Path(folder)
    evaluation = json.loads((path / "evaluation.json").read_text())
    evaluation["settings"] |= {"correction_rounds": 1, "cue": cue}
    (path / "evaluation.json").write_text(json.dumps(evaluation))
    rows = [json.loads(line) for line in (path / "predictions.jsonl").read_text().splitlines()]
    for row, value in zip(rows, values, strict=True):
        row["statistics"] |= {name: [value, 1.0] for name in CORRECTED}
    (path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_corrections_are_compared(tmp_path: Path) -> None:
    runs = [
        _with_corrections(run_folder(tmp_path / "a", BASELINE), BASELINE),
        _with_corrections(run_folder(tmp_path / "b", BASELINE, method="rac"), BETTER),
    ]
    rows = {(row["run"], row["metric"]): row for row in _compare(tmp_path, *runs)}
    assert [metric for run, metric in rows if run == runs[1]] == ["exact_match", *CORRECTED]
    for metric in CORRECTED:
        assert rows[runs[1], metric]["paired_difference"] == 0.25
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000


@pytest.mark.parametrize(("cue", "setting"), [(None, "correction_rounds"), ("Sure?", "cue")])
def test_evaluations_with_different_corrections_are_refused(tmp_path: Path, cue: str | None, setting: str) -> None:
    first = run_folder(tmp_path / "a", BASELINE)
    first = first if setting == "correction_rounds" else _with_corrections(first, BASELINE)
    second = _with_corrections(run_folder(tmp_path / "b", BASELINE), BASELINE, cue)
    with pytest.raises(InputError, match=rf"were evaluated with {setting} \S+ and \S+; evaluate them alike"):
        _compare(tmp_path, first, second)


@pytest.mark.parametrize(
    ("setting", "value"), [("as_chat", True), ("max_new_tokens", 16), ("prompt_template", "Q: {prompt}")]
)
def test_evaluations_with_other_forms_of_rows_or_lengths_are_refused(
    tmp_path: Path, setting: str, value: object
) -> None:
    runs = [run_folder(tmp_path / "a", BASELINE), run_folder(tmp_path / "b", BASELINE, method="bash")]
    evaluation = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    evaluation["settings"][setting] = value
    (tmp_path / "b" / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(InputError, match=f"were evaluated with {setting}"):
        _compare(tmp_path, *runs)


def test_answers_that_were_cut_are_counted_below_the_table(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name, [0.0, 1.0], method=method) for name, method in (("a", "sft"), ("b", "bash"))]
    for name, cut in (("a", 2), ("b", 0)):
        path = tmp_path / name / "evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"unfinished": cut}))
    _compare(tmp_path, *runs)
    written = (tmp_path / "out" / "comparison.md").read_text()
    assert f"before the model ended them: 2 of 2 ({tmp_path}/a), 0 of 2 ({tmp_path}/b)." in written


def _with_steps(folder: str, flops: float) -> str:
    """Write the metrics of two steps as train does, and return the folder."""
    step = {"tokens": 10, "no_grad_tokens": 5, "flops": flops, "step_time_s": 1.0}
    Path(folder, "metrics.jsonl").write_text("".join(json.dumps(step | {"step": i}) + "\n" for i in (1, 2)))
    return folder


@pytest.mark.parametrize(("flops", "told"), [(1.3e9, True), (1.01e9, False)])
def test_budgets_that_differ_are_named_in_the_first_line(tmp_path: Path, flops: float, told: bool) -> None:
    runs = [_with_steps(run_folder(tmp_path / "a", BASELINE), 1e9)]
    runs.append(_with_steps(run_folder(tmp_path / "b", BETTER, method="bash"), flops))
    _compare(tmp_path, *runs)
    first = (tmp_path / "out" / "comparison.md").read_text().splitlines()[0]
    assert first.startswith("The budgets differ") is told
    assert ("1.30" in first) is told


def test_what_follows_is_said_in_words_with_the_limits_of_one_seed(tmp_path: Path) -> None:
    rows = 50
    a = run_folder(tmp_path / "a", [0.0] * rows, losses=[(1.0 + i / rows, 2) for i in range(rows)])
    b = run_folder(
        tmp_path / "b",
        [0.9 + i / 500 for i in range(rows)],
        method="bash",
        losses=[(1.0 + (rows - i) / rows, 2) for i in range(rows)],
    )
    _compare(tmp_path, a, b)
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert f"bash ({b}, seed 0), compared with sft ({a}, seed 0):" in lines
    seeds, better, undecided = (line for line in lines if line[:2] == "- ")
    assert better.startswith("- Better in exact_match (+0.9")
    assert undecided == "- No difference shown in loss."
    assert seeds == "- Neither side has a second seed: the words hold for these two models, not for other seeds."
    assert 'class="better single"' in (tmp_path / "out" / "comparison.html").read_text().replace("number ", "")


def test_what_was_run_and_what_it_cost_stands_in_every_form_of_the_report(tmp_path: Path) -> None:
    runs = [_with_steps(run_folder(tmp_path / "a", BASELINE), 1e9)]
    runs.append(run_folder(tmp_path / "b", BETTER, method="bash"))
    _compare(tmp_path, *runs)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    first, second = document["runs"]
    assert (first["steps"], first["tokens"], first["FLOPs"], first["seconds"]) == ("2", "20", "2e+09", "2")
    assert second["FLOPs"] == "not known"
    assert "selfgen.method bash" in second["settings"]
    assert document["budgets"].startswith("The budget is not known of bash")
    for kind in ("md", "html"):
        text = (tmp_path / "out" / f"comparison.{kind}").read_text()
        assert "2e+09" in text
        assert "selfgen.method bash" in text


def test_a_step_that_a_killed_run_did_not_finish_writing_is_not_counted(tmp_path: Path) -> None:
    run = _with_steps(run_folder(tmp_path / "a", BASELINE), 1e9)
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tok')
    _compare(tmp_path, run)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"][0]["steps"] == "2"


def test_a_value_that_is_not_finite_is_no_finding_and_null_in_the_json(tmp_path: Path) -> None:
    """A model that has diverged has such a loss."""
    a = run_folder(tmp_path / "a", BASELINE * 5, losses=[(1.0, 2)] * 20)
    b = run_folder(tmp_path / "b", BASELINE * 5, method="bash", losses=[(float("nan"), 2)] * 20)
    _compare(tmp_path, a, b)
    text = (tmp_path / "out" / "comparison.json").read_text()
    rows = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["rows"]
    (_, row) = (row for row in rows if row["metric"] == "loss")
    assert (row["mean"], row["paired_difference"], row["p"], row["verdict"]) == (None, None, 1.0, "not finite")
    written = (tmp_path / "out" / "comparison.md").read_text()
    assert "- Not finite, here or in the baseline, in loss." in written
    assert "nan" not in written


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("metrics.jsonl", text) for text in ("5\n", '{"flops": 1}\n', '{"flops": null, "tokens": 1}\n', "{\n")],
        *[("config.yaml", text) for text in ("a: [", "- 1\n", "seed: 0\n")],
        *[("evaluation.json", text) for text in ("{", "[1]", "{}", '{"settings": 1}')],
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, name: str, text: str) -> None:
    run = run_folder(tmp_path / "a", BASELINE)
    (tmp_path / "a" / name).write_text(text)
    with pytest.raises(InputError) as caught:
        _compare(tmp_path, run)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path}/a/{name}: ")


@pytest.mark.parametrize(
    "change",
    [
        {"statistics": None},
        {"statistics": {"x": ["a"]}},
        {"statistics": {"x": 1.0}},
        {"recovery": [True]},
        {"teacher_forced": None},
        {"sample_id": "x"},
        {"reference": None},
    ],
    ids=str,
)
def test_a_damaged_row_is_one_line_that_names_its_file(tmp_path: Path, change: dict[str, object]) -> None:
    run = run_folder(tmp_path / "a", BASELINE)
    path = tmp_path / "a" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | change) + "\n" for row in rows))
    with pytest.raises(InputError, match=f"^{path}: damaged") as caught:
        _compare(tmp_path, run)
    assert len(str(caught.value).splitlines()) == 1


def test_predictions_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "a", BASELINE)
    path = tmp_path / "a" / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"predictions": "0" * 64}))
    with pytest.raises(InputError, match=rf"predictions.jsonl: not the rows of {path}; evaluate the model again"):
        _compare(tmp_path, run)


def _judged(folder: str, judge: str, against: str = "reference") -> str:
    """Write what a judge has said of a run, and return the folder."""
    path = Path(folder) / "evaluation.json"
    rate = {"value": 0.6, "low": 0.5, "high": 0.7}
    judged = {"judge": judge, "against": against, "length_controlled_win_rate": rate, "unclear": 0.25, "by_place": 0.5}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"judged": judged}))
    rows = [json.loads(line) for line in (Path(folder) / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        row["statistics"]["win_rate"] = [0.5, 1.0]
    (Path(folder) / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(("other", "compared"), [("one", True), ("two", False)])
def test_win_rates_are_compared_if_one_judge_gave_them(tmp_path: Path, other: str, compared: bool) -> None:
    runs = [_judged(run_folder(tmp_path / "a", BASELINE), "one")]
    runs.append(_judged(run_folder(tmp_path / "b", BETTER, method="bash"), other))
    metrics = {row["metric"] for row in _compare(tmp_path, *runs)}
    assert ("win_rate" in metrics) is compared
    written = (tmp_path / "out" / "comparison.md").read_text()
    told = "win_rate is left out, because the judges or what they compared with differ: one against reference, two"
    assert (told in written) is not compared
    assert f"{other} against reference: win rate at equal length 0.600 [0.500, 0.700]; 25% of the verdicts" in written


def test_seeds_that_were_evaluated_with_other_weights_are_groups_of_their_own(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "a", BASELINE), run_folder(tmp_path / "b", BASELINE, seed=1)]
    for run, dtype in zip(runs, ("float32", "bfloat16"), strict=True):
        path = Path(run) / "evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": dtype}))
    assert [row["seeds"] for row in _compare(tmp_path, *runs)] == [[0], [1]]


def test_a_metric_of_which_less_is_better_is_worse_if_it_grows(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", BASELINE * 5, losses=[(1.0, 2)] * 20)
    b = run_folder(tmp_path / "b", BASELINE * 5, method="bash", losses=[(1.5, 2)] * 20)
    compare.run(CompareOptions(runs=[a, b], output_dir=str(tmp_path / "out"), metrics=["loss"]))
    (_, row) = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert (row["metric"], row["verdict"]) == ("loss", "worse")


def test_a_metric_that_an_evaluation_lacks_is_refused(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "a", BASELINE)
    with pytest.raises(
        InputError, match="--metrics: not in every evaluation, or not comparable: rouge_l; there are exact_match, loss"
    ):
        compare.run(CompareOptions(runs=[run], output_dir=str(tmp_path / "out"), metrics=["rouge_l"]))


def test_the_report_needs_no_other_file_and_shows_texts_as_they_are(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "a", BASELINE)
    path = tmp_path / "a" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"answer": "a"', '"answer": "<script>alert(1)</script>"'))
    _compare(tmp_path, run)
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)


def test_other_references_are_refused(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "a", BASELINE), run_folder(tmp_path / "b", BASELINE, method="bash")]
    path = tmp_path / "b" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"reference": "r"', '"reference": "R"'))
    with pytest.raises(InputError, match="with other references, by a changed file or another tokenizer"):
        _compare(tmp_path, *runs)


def test_predictions_of_an_older_version_are_refused(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "a", BASELINE)
    (tmp_path / "a" / "predictions.jsonl").write_text('{"sample_id": 0, "metrics": {"exact_match": 1.0}}\n')
    with pytest.raises(InputError, match="line 1 is not as this version of evaluate writes it; evaluate"):
        _compare(tmp_path, run)
