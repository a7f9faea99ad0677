import logging
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfgen_ds import methods
from selfgen_ds.config import (
    DataConfig,
    ModelConfig,
    Recipe,
    SelfgenConfig,
    TrainConfig,
)
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.methods.method import Method, RoundMethod
from tests.plans import plan
from tests.problems import settings_problems

BYTES = byte_tokenizer()
NO_CLASS = 3


class Half(Method):
    """A user's method that leaves rows out."""

    keeps_rows = False


class Nothing(Method):
    """A user's method that reads one setting."""

    settings = frozenset({"temperature"})


def _rounds(total_steps: int, step_size: int, epoch_size: int, epochs_per_round: int) -> RoundMethod:
    told = plan(total_steps=total_steps, step_size=step_size, epoch_size=epoch_size)
    return RoundMethod(SelfgenConfig(epochs_per_round=epochs_per_round), told)


@given(
    step_size=st.integers(1, 40),
    epoch_size=st.integers(1, 60),
    epochs_per_round=st.integers(1, 5),
    total_steps=st.integers(1, 60),
)
def test_a_steps_round_is_that_of_its_first_row(
    step_size: int, epoch_size: int, epochs_per_round: int, total_steps: int
) -> None:
    epochs_per_round = max(epochs_per_round, -(-step_size // epoch_size))  # a round has at least one step
    method = _rounds(total_steps, step_size, epoch_size, epochs_per_round)
    expected, row, number = [], 0, 0
    for _ in range(total_steps):
        while row >= (number + 1) * epochs_per_round * epoch_size:
            number += 1
        expected.append(number)
        row += step_size
    assert [method.round_of(step) for step in range(total_steps)] == expected
    assert method.rounds == len(set(expected)) == expected[-1] + 1
    for number, steps in groupby(range(total_steps), key=lambda step: expected[step]):
        its_steps = list(steps)
        assert method.first_step(number) == its_steps[0]
        assert method.first_step(number + 1) >= its_steps[-1] + 1
        if number + 1 < method.rounds:
            assert method.first_step(number + 1) == its_steps[-1] + 1


@pytest.mark.parametrize(
    ("epochs_per_round", "total_steps", "expected"),
    # epochs of 10 rows, steps of 4: rounds of one epoch start with steps 0, 3, 5, 8, 10
    [(1, 1, [0]), (1, 10, [0, 3, 5, 8]), (1, 11, [0, 3, 5, 8, 10]), (2, 11, [0, 5, 10]), (9, 11, [0])],
)
def test_rounds_start_with_the_first_step_of_their_epochs(
    epochs_per_round: int, total_steps: int, expected: list[int]
) -> None:
    method = _rounds(total_steps, 4, 10, epochs_per_round)
    assert [method.first_step(number) for number in range(method.rounds)] == expected


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_is_found_by_its_name(name: str) -> None:
    assert methods.find(name) is methods.METHODS[name]


def test_a_class_of_the_users_is_a_method() -> None:
    assert methods.find("tests.unit.test_methods:Nothing") is Nothing
    assert methods.find("selfgen_ds.methods.bash:Bash") is methods.METHODS["bash"]


@pytest.mark.parametrize(
    "name",
    [
        *("magic", "", ":", "Bash", "bash:", "tests.unit.test_methods", "tests.unit.test_methods:"),
        *("nowhere:Bash", "tests.unit.test_methods:Missing", "tests.unit.test_methods:NO_CLASS"),
        "selfgen_ds.methods.method:RoundMethod",
        *("pathlib:Path", "tests.unit.test_methods:_rounds", ":Bash", "./method.py:Mine", "a b:c", "a..b:c"),
    ],
)
def test_an_unknown_method_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError, match=r"^selfgen\.method: ") as caught:
        methods.find(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_reads_settings_that_there_are(name: str) -> None:
    assert methods.METHODS[name].settings <= vars(SelfgenConfig()).keys() - {"method"}


# --- settings of a recipe ---


def _recipe(folder: Path, **config: Any) -> Recipe:
    return Recipe(
        output_dir=str(folder / "run"),
        deepspeed=str(Path(__file__).parents[2] / "ds_configs" / "zero3_cpu.json"),
        data=DataConfig(train="builtin:pointer_chase"),
        model=ModelConfig(preset={"hidden_size": 8}, tokenizer="byte", dtype="float32"),
        selfgen=SelfgenConfig(**config),
        train=TrainConfig(max_steps=10, micro_batch_size=1),
    )


OTHER_VALUES: dict[str, Any] = {
    "replace_probability": 0.5,
    "schedule": "linear",
    "position": "late",
    "passes": 2,
    "temperature": 2.0,
    "top_p": 0.5,
    "top_k": 3,
    "max_differing_share": 0.5,
    "drawn_context_weight": 0.5,
    "epochs_per_round": 2,
    "reject": ["a"],
    "generation_batch_size": 3,
    "generate_command": "env {model} {prompts} {answers}",
    "max_new_tokens": 5,
    "answers_per_prompt": 2,
    "sft_share": 0.1,
    "cue": "No.",
    "max_equal_share": 0.1,
}


@pytest.mark.parametrize("method", [*methods.METHODS, "tests.unit.test_methods:Nothing"])
def test_a_setting_is_read_or_refused(method: str, tmp_path: Path) -> None:
    refused = [setting for setting in OTHER_VALUES if setting not in methods.find(method).settings]
    assert sorted(settings_problems(_recipe(tmp_path, method=method, **OTHER_VALUES))) == sorted(
        f"selfgen.{setting}: {method} does not read this setting; remove the setting" for setting in refused
    )


def test_a_recipes_settings_for_another_method_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = _recipe(tmp_path, method="rac", passes=2, schedule="linear", cue="No.")
    with caplog.at_level(logging.INFO, "selfgen_ds"):
        settings_problems(recipe, {"selfgen.method", "selfgen.cue"})
    assert "rac does not read the recipe's selfgen.schedule, selfgen.passes" in caplog.text


@pytest.mark.parametrize("method", [*methods.METHODS, "tests.unit.test_methods:Half"])
def test_packing_is_refused_before_any_row_is_read_if_the_method_makes_rows_of_its_own(
    method: str, tmp_path: Path
) -> None:
    recipe = _recipe(tmp_path, method=method)
    recipe.data.train, recipe.data.packing = str(tmp_path / "rows.jsonl"), True
    (tmp_path / "rows.jsonl").write_text("no row\n")
    refused = [
        f"data.packing: expected false with {method}, whose rows differ from the samples in number and length; "
        "use data.group_by_length to save padding"
    ]
    assert settings_problems(recipe) == ([] if methods.find(method).keeps_rows else refused)


BAD_VALUES = [
    ("epochs_per_round", 0),
    ("generation_batch_size", 0),
    ("max_new_tokens", 0),
    ("answers_per_prompt", 0),
    ("sft_share", 1.1),
    ("sft_share", -0.1),
    ("max_equal_share", 1.1),
    ("reject", ["a("]),
    ("reject", "nowhere:f"),
]


@pytest.mark.parametrize(("setting", "value"), BAD_VALUES)
def test_a_bad_value_is_one_clear_line(setting: str, value: Any, tmp_path: Path) -> None:
    [line] = settings_problems(_recipe(tmp_path, method="rac", **{setting: value}))
    assert line.startswith(f"selfgen.{setting}: ")
