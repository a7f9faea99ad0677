"""`inspect`: counts, lengths, and rows with the kinds of their tokens; no colors, because the output is no terminal."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from selfgen_ds.config import (
    DataConfig,
    Recipe,
    SelfgenConfig,
    TrainConfig,
)
from selfgen_ds.errors import InputError
from selfgen_ds.inspection import inspect
from tests.distributed import runs


def _recipe(folder: Path, completions: list[str], **data: object) -> Recipe:
    rows = [json.dumps({"prompt": f"ask {i}: ", "completion": text}) for i, text in enumerate(completions)]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    settings: dict = {"train": str(folder / "rows.jsonl"), "max_length": 32} | data
    return runs.recipe(folder, data=DataConfig(**settings), train=TrainConfig(max_steps=1))


def _shown(recipe: Recipe, capsys: pytest.CaptureFixture[str], rows: int = 1, draw: bool = False) -> str:
    inspect(recipe, set(), rows, draw)
    return capsys.readouterr().out


def test_prompt_response_and_end_token_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = _shown(_recipe(tmp_path, ["tell"]), capsys)
    assert "[prompt]ask 0: [replaceable]tell[target]</s>" in output


def test_read_used_truncated_and_refused_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    recipe = _recipe(tmp_path, ["a", "b" * 100, "c"], max_truncated_share=1.0)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('\n{"prompt": "' + "long " * 20 + '", "completion": "d"}\n')
    recipe.data.max_refused_share = 0.5
    assert "4 rows read, 3 used (1 truncated), 1 refused; responses end with </s>" in _shown(recipe, capsys)


def test_too_many_truncated_rows_are_an_error_after_the_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(tmp_path, ["b" * 100, "c"], max_truncated_share=0.1)
    with pytest.raises(InputError, match=r"1 of 2 responses are cut"):
        inspect(recipe, set(), 1, False)
    assert "2 rows read, 2 used (1 truncated)" in capsys.readouterr().out


def test_the_histogram_counts_every_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = _shown(_recipe(tmp_path, ["x" * n for n in (1, 1, 2, 9, 20)]), capsys)
    bars = re.findall(r"^ +\d+ to \d+ +(\d+) ", output, flags=re.M)
    assert sum(map(int, bars)) == 5
    assert "tokens per row: 9 to 28, mean 14.6" in output


def test_packed_rows_are_counted_and_show_their_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = _shown(_recipe(tmp_path, ["abcdef", "ghijkl"], packing=True), capsys)
    assert "packed into 1 rows of 32 tokens; 87.5% of the positions are used" in output
    assert {"row 1, sample 0, 14 tokens", "row 1, sample 1, 14 tokens"} <= {
        line.rstrip(" ─") for line in output.splitlines()
    }


def test_drawn_tokens_are_shown_before_the_reference_that_they_replace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(tmp_path, ["abcdefgh"])
    recipe.selfgen = SelfgenConfig(replace_probability=1.0, schedule="linear", schedule_share=0.1)
    output = _shown(recipe, capsys, draw=True)
    assert re.search(r"\[prompt\]ask 0: \[drawn\].*\[for\]abcdefgh\[target\]</s>", output, flags=re.S)


def test_zero_rows_print_the_counts_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = _shown(_recipe(tmp_path, ["tell"]), capsys, rows=0)
    assert "1 rows read" in output
    assert "ask 0" not in output


def test_a_bad_row_is_the_same_error_as_in_training(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, ["tell", ""])
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2, field 'completion': expected text"):
        inspect(recipe, set(), 1, False)


def test_settings_are_checked_as_for_training(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, ["tell"])
    recipe = replace(recipe, selfgen=SelfgenConfig(method="magic"))
    with pytest.raises(InputError, match=r"selfgen\.method"):
        inspect(recipe, set(), 1, False)


def test_rows_are_shown_once_even_if_more_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = _shown(_recipe(tmp_path, ["tell"]), capsys, rows=3)
    assert output.count("[prompt]") == 1


def test_evaluation_rows_are_checked_and_counted_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe(tmp_path, ["tell"])
    (tmp_path / "eval.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    recipe.data.eval = str(tmp_path / "eval.jsonl")
    assert "eval.jsonl: 4 rows read" in _shown(recipe, capsys)
    (tmp_path / "eval.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match=r"eval\.jsonl, line 1: field 'completion' is missing"):
        inspect(recipe, set(), 1, False)


def test_rows_longer_than_the_models_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.max_length: expected at most the model's 256 positions"):
        inspect(_recipe(tmp_path, ["tell"], max_length=512), set(), 1, False)


def test_the_histogram_of_one_length_is_one_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = _shown(_recipe(tmp_path, ["abcd", "efgh"]), capsys)
    assert re.findall(r"^ +(\d+) to (\d+) +(\d+) ", output, flags=re.M) == [("12", "12", "2")]


def test_a_round_of_bash_is_shown_as_it_would_be_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe(tmp_path, ["abcdefgh", "ijklmnop"])
    recipe.selfgen = SelfgenConfig(method="bash", replace_probability=1.0, schedule="linear", schedule_share=1.0)
    output = _shown(recipe, capsys, rows=3, draw=True)
    for number, text in enumerate(["abcdefgh", "ijklmnop"]):
        pattern = rf"\[prompt\]ask {number}: \[drawn\].*\[for\]{text}\[target\]</s>"
        assert re.search(pattern, output, flags=re.S)
    assert _shown(recipe, capsys, rows=3, draw=True) == output
    recipe.selfgen.replace_probability = 0.0
    assert "[prompt]ask 0: [replaceable]abcdefgh[target]</s>" in _shown(recipe, capsys, draw=True, rows=3)


def test_the_model_answer_is_shown_before_cue_and_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe(tmp_path, ["abcdefgh"])
    recipe.selfgen = SelfgenConfig(method="rac", sft_share=0.0, cue=" No: ", max_new_tokens=3)
    output = _shown(recipe, capsys, rows=3, draw=True)
    assert re.search(r"\[prompt\]ask 0: \[answer\].*\[prompt\] No: \[target\]abcdefgh</s>", output, flags=re.S)
    assert "[for]" not in output
    assert "sample 0, 24 tokens" in output


def test_a_plain_row_of_rac_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe(tmp_path, ["abcdefgh"])
    recipe.selfgen = SelfgenConfig(method="rac", sft_share=1.0)
    assert "[prompt]ask 0: [target]abcdefgh</s>" in _shown(recipe, capsys, rows=1, draw=True)


def test_every_answer_to_a_prompt_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe(tmp_path, ["abcdefgh"])
    recipe.selfgen = SelfgenConfig(method="rac", sft_share=0.0, answers_per_prompt=3, max_new_tokens=3, cue="")
    output = _shown(recipe, capsys, rows=1, draw=True)
    assert len(re.findall(r"row \d, sample 0", output)) == 3


def test_only_kinds_of_tokens_that_are_shown_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe(tmp_path, ["tell"])
    assert re.findall(r"^(\w+): ", _shown(recipe, capsys), flags=re.M) == ["prompt", "replaceable", "target"]
    recipe.selfgen.replace_probability = 1.0
    drawn = re.findall(r"^(\w+): ", _shown(recipe, capsys, draw=True), flags=re.M)
    assert drawn == ["prompt", "target", "drawn", "for"]


def test_problems_of_training_and_evaluation_rows_come_together(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, ["tell"])
    recipe.data.eval = str(tmp_path / "eval.jsonl")
    for name in ("rows", "eval"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError) as caught:
        inspect(recipe, set(), 1, False)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{tmp_path}/{name}.jsonl" for name in ("rows", "eval")]


def test_a_negative_number_of_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--rows: expected 0 or more, got -1$"):
        inspect(_recipe(tmp_path, ["tell"]), set(), -1, False)


@pytest.mark.parametrize("train", [TrainConfig(), TrainConfig(epochs=2.0), TrainConfig(max_steps=3)], ids=str)
def test_the_length_of_the_run_may_be_given_or_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], train: TrainConfig
) -> None:
    recipe = _recipe(tmp_path, ["tell"])
    recipe.train = train
    assert "[prompt]ask 0: [replaceable]tell[target]</s>" in _shown(recipe, capsys)


def test_rows_are_shown_before_those_that_cannot_be_used_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(tmp_path, ["tell"])
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('\n{"prompt": "no answer"}\n')
    with pytest.raises(InputError, match=r"1 of 2 rows cannot be used \(.*line 2: field 'completion' is missing"):
        inspect(recipe, set(), 1, False)
    assert "[prompt]ask 0: [replaceable]tell[target]</s>" in capsys.readouterr().out


def test_rows_that_are_too_long_are_in_the_histogram_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = _recipe(tmp_path, ["a", "b"], max_refused_share=0.5)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write("\n" + json.dumps({"prompt": "p" * 90, "completion": "c"}))
    assert "tokens per row: 9 to 92" in _shown(recipe, capsys)
    assert "1 of 3 rows cannot be used" in caplog.text
    assert "line 3: the prompt leaves no room for a response within 32 tokens; it has 90 itself" in caplog.text
