"""A refused command line: every problem of its options and of its recipe file is a line that says what to do."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from selfgen_ds import cli
from selfgen_ds.config import LoraConfig, Recipe
from selfgen_ds.errors import InputError, Problems
from selfgen_ds.validation.command_line import check_command_line

RECIPE = """\
output_dir: runs/mine
deepspeed: zero3_cpu
data: {train: rows.jsonl}
"""


def refused(*options: object, command: str = "train") -> list[str]:
    """Return the lines with which a sub-command refuses its options."""
    with pytest.raises(InputError) as caught:
        cli._parse([command, *map(str, options)])
    return str(caught.value).splitlines()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the path of a recipe to be written."""
    return tmp_path / "recipe.yaml"


def test_all_problems_of_file_and_options_come_at_once(file: Path) -> None:
    file.write_text(RECIPE + "train: {micro_batchsize: 8, max_steps: ten}\noptim: {learning_rate: 1e-4}\n")
    assert refused("--config", file, "--seed=x", "--train.epoch", "3") == [
        f"{file}: train.micro_batchsize: no such setting; did you mean train.micro_batch_size?",
        f"{file}: train.max_steps: expected a whole number, got 'ten'",
        "--seed: expected a whole number, got 'x'",
        "--train.epoch: no such setting; did you mean --train.epochs?",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("max_steps: 3", "max_steps: no such setting; did you mean train.max_steps?"),
        ("zebra: 3", "zebra: no such setting"),
        ("optim: {lr: 3}", "optim.lr: no such setting; did you mean optim.learning_rate?"),
        ("modell: {dtype: float32}", "modell: no such setting; did you mean model?"),
        ("train: 5", "train: expected settings by name, got 5"),
        ("model: {lora: {rank: 4}}", "model.lora.rank: no such setting; did you mean model.lora.r?"),
        ("model: {dtype: float16}", "model.dtype: expected float32 or bfloat16, got 'float16'"),
        ("model: {preset: 5}", "model.preset: expected settings by name, got 5"),
        ("train: {activation_checkpointing: 7}", "train.activation_checkpointing: expected true or false, got 7"),
        ("optim: {betas: 0.9}", "optim.betas: expected a list of numbers, got 0.9"),
        ("selfgen: {passes: few}", "selfgen.passes: expected a whole number or exact, got 'few'"),
        ("train: {max_steps: true}", "train.max_steps: expected a whole number, got True"),
        ("seed: 1.0", "seed: expected a whole number, got 1.0"),
    ],
)
def test_a_setting_that_does_not_exist_or_has_another_type_is_named_with_its_file(
    file: Path, text: str, problem: str
) -> None:
    file.write_text(RECIPE + text)
    assert refused("--config", file) == [f"{file}: {problem}"]


@pytest.mark.parametrize("sources", ["{path: a.jsonl, subst: b}", "[a.jsonl, {path: b.jsonl, subst: b}]"])
def test_an_unknown_key_of_a_source_is_named(file: Path, sources: str) -> None:
    file.write_text(RECIPE.replace("rows.jsonl", sources))
    problem = "data.train.subst: no such setting; did you mean data.train.subset?"
    assert refused("--config", file) == [f"{file}: {problem}"]


def test_a_source_without_a_path_is_named(file: Path) -> None:
    file.write_text(RECIPE.replace("rows.jsonl", "{subset: a}"))
    assert refused("--config", file) == [f"{file}: data.train.path: missing"]


@pytest.mark.parametrize(
    "option",
    [
        ("--train", "{max_steps: 3}"),
        ("--train", "{max_steps: 3, epochs: null}"),
        ("--model.preset.hidden_size", "8"),
        ("--data.train+", "more.jsonl"),
        ("--data.train", "[a.jsonl, {path: b.jsonl}]"),
        ("--optim.learning_rate", "1e-4"),
        ("--optim.betas", "[0.9, 0.95]"),
        ("--resume", "null"),
        ("--model.lora.r", "8"),
    ],
)
def test_an_option_that_is_right_is_not_accused_beside_one_that_is_wrong(option: tuple[str, str]) -> None:
    assert refused("--config", "demo", *option, "--seeds", "3") == [
        "--seeds: no such setting; did you mean --seed?",
    ]


def test_a_recipe_without_its_option_is_told_how_to_give_it() -> None:
    recipe = "recipes/demo.yaml"
    assert refused(recipe) == [f"{recipe}: expected an option, such as --config {recipe}"]


@pytest.mark.parametrize("option", ["--optim.learning_rat", "--selfgen.temp", "--output_di"])
def test_an_abbreviated_option_is_refused(option: str) -> None:
    assert refused("--config", "demo", option, "3")[0].startswith(f"{option}: no such setting")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--train.max_steps", "many", "a whole number"),
        ("--selfgen.schedule", "cubic", "constant or linear or exponential or inverse_sigmoid"),
        ("--resume", "yes", "auto"),
    ],
)
def test_an_option_of_another_type_is_refused(option: str, value: str, expected: str) -> None:
    assert refused("--config", "demo", option, value) == [f"{option}: expected {expected}, got {value!r}"]


@pytest.mark.parametrize("command", ["train", "inspect", "bench"])
def test_every_command_with_a_recipe_names_the_wrong_settings_of_its_file(command: str, file: Path) -> None:
    file.write_text(RECIPE + "train: {max_step: 3}\n")
    problem = f"{file}: train.max_step: no such setting; did you mean train.max_steps?"
    assert refused("--config", file, command=command) == [problem]


@pytest.mark.parametrize(
    ("command", "options", "problems"),
    [
        ("inspect", ["--rows", "few"], ["--rows: expected a whole number, got 'few'"]),
        ("inspect", ["--draw=7"], ["--draw: expected true or false, got '7'"]),
        ("inspect", ["--row", "3"], ["--row: no such setting; did you mean --rows?"]),
        ("bench", ["--grid", "all"], ["--grid: expected budget or rollouts or full, got 'all'"]),
        (
            "bench",
            ["--steps", "many", "--seed=x"],
            ["--steps: expected a whole number, got 'many'", "--seed: expected a whole number, got 'x'"],
        ),
        ("train", ["--rows", "3"], ["--rows: no such setting"]),
    ],
)
def test_a_commands_options_beside_the_recipe_are_checked_with_it(
    command: str, options: list[str], problems: list[str]
) -> None:
    assert refused("--config", "demo", *options, command=command) == problems


@pytest.mark.parametrize(
    ("command", "options", "problems"),
    [
        (
            "evaluate",
            ["--model", "run/model", "--max_lenght", "8", "--batch_size=ten"],
            [
                "--max_lenght: no such setting; did you mean --max_length?",
                "--batch_size: expected a whole number, got 'ten'",
                "data: missing; give it as --data",
                "output_dir: missing; give it as --output_dir",
            ],
        ),
        (
            "export",
            ["--checkpoints", "run"],
            [
                "--checkpoints: no such setting; did you mean --checkpoint?",
                "checkpoint: missing; give it as --checkpoint",
                "output_dir: missing; give it as --output_dir",
            ],
        ),
    ],
)
def test_a_command_without_a_recipe_names_the_one_place_for_a_missing_setting(
    command: str, options: list[str], problems: list[str]
) -> None:
    assert refused(*options, command=command) == problems


def test_every_missing_setting_is_named_with_the_two_places_for_it() -> None:
    assert refused("--deepspeed", "zero3_cpu") == [
        f"{setting}: missing; give it in the recipe (--config) or as --{setting}"
        for setting in ("output_dir", "data.train")
    ]


def test_a_recipe_without_any_setting_misses_every_required_one(file: Path) -> None:
    file.write_text("{}")
    assert [line.split(":")[0] for line in refused("--config", file)] == ["output_dir", "deepspeed", "data.train"]


def test_a_recipe_that_does_not_exist_is_answered_with_the_packaged_ones() -> None:
    [line] = refused("--config", "none.yaml", "--train.max_steps", "3")
    assert line.startswith("--config: no file 'none.yaml'; the packaged recipes are bench, bench-1b, demo, ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"data: [1\nseed: 2", ", line 2: malformed YAML: expected ',' or ']', but got ':'"),
        (
            b"seed: \x00",
            ": malformed YAML: unacceptable character #x0000: special characters are not allowed in "
            '"<unicode string>", position 6',
        ),
        (b"- 1", ": expected settings by name, got list"),
        (b"output_dir: \xff", ": expected UTF-8, got another encoding at byte 12"),
    ],
    ids=["YAML", "character", "list", "bytes"],
)
def test_a_damaged_recipe_is_one_line(file: Path, content: bytes, problem: str) -> None:
    file.write_bytes(content)
    assert refused("--config", file) == [f"--config: {file}{problem}"]


def test_an_option_without_its_value_is_refused() -> None:
    given = ("--output_dir", "--config", "demo", "--optim.learning_rat", "3", "--seed")
    assert refused(*given) == [
        "--output_dir: expected a value",
        "--seed: expected a value",
        "--optim.learning_rat: no such setting; did you mean --optim.learning_rate?",
    ]
    assert refused("--config") == ["--config: expected a value"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["a", "--output_di", "x"],
            ["--output_di: no such setting; did you mean --output_dir?", "--output_dir: missing"],
        ),
        (["a", "--output_dir"], ["--output_dir: expected a value"]),
        (["a", "--output_dir", "x", "--metrics"], ["--metrics: expected a value"]),
        (
            ["a", "--output_dir", "x", "--metrics", "{a: 1}"],
            ["--metrics: expected a list of texts, got '{a: 1}'"],
        ),
    ],
)
def test_wrong_options_of_compare_are_named(arguments: list[str], expected: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        cli._parse(["compare", *arguments])
    assert str(caught.value).splitlines() == expected


def test_compare_takes_metrics() -> None:
    parsed = cli._parse(["compare", "a", "b", "--output_dir", "x", "--metrics", "[loss, recovery_4]"])
    assert parsed.compare.metrics == ["loss", "recovery_4"]


def test_a_list_of_a_few_values_is_described_by_them() -> None:
    with pytest.raises(InputError, match=r"^--weight_bits: expected a list of 8 or 4, got "):
        cli._parse(["evaluate", "--model", "m", "--data", "d", "--output_dir", "o", "--weight_bits", "[3]"])


def test_options_without_a_value_are_no_problem_beside_one() -> None:
    problems = Problems()
    given = ["--config", "demo", "--output_dir", "x", "--optim.learnrate", "3", "--print_config"]
    check_command_line(problems, given, (Recipe,))
    assert problems.lines == ["--optim.learnrate: no such setting; did you mean --optim.learning_rate?"]


def test_the_help_shows_the_settings_of_a_section_that_a_recipe_may_leave_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli._parser().parse_args(["train", "--help"])
    text = capsys.readouterr().out
    assert all(f"--model.lora.{field.name} " in text for field in fields(LoraConfig))


@pytest.mark.parametrize(("arguments", "got"), [([], "none"), (["trian", "--config", "demo"], "trian")])
def test_an_unknown_command_is_answered_with_the_known_ones(arguments: list[str], got: str) -> None:
    with pytest.raises(InputError) as caught:
        cli._parse(arguments)
    expected = "expected a command (train, inspect, probe, pilot, bench, evaluate, generate, export, compare)"
    assert str(caught.value) == f"{expected}, got {got}; `selfgen-ds --help` describes them"
