import itertools
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from selfgen_ds import cli
from selfgen_ds.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    SelfgenConfig,
    Source,
    Sources,
    TrainConfig,
    to_yaml,
)
from selfgen_ds.engine import ds_config
from selfgen_ds.files import write_atomically
from selfgen_ds.ranks import signals
from selfgen_ds.validation import deepspeed_json
from tests.problems import recipe_problems

ROOT = Path(__file__).parents[2]
RECIPES = pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
DEMO = str(ROOT / "recipes" / "demo.yaml")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    json_file = tmp_path / "ds.json"
    json_file.write_text("{}")
    return Recipe(
        output_dir=str(tmp_path / "run"),
        deepspeed=str(json_file),
        data=DataConfig(train="builtin:pointer_chase", eval="builtin:pointer_chase"),
        model=ModelConfig(preset={"hidden_size": 8}, tokenizer="byte"),
        selfgen=SelfgenConfig(schedule="linear"),
        train=TrainConfig(max_steps=10, micro_batch_size=1),
    )


def _set(recipe: Recipe, setting: str, value: object) -> None:
    node: Any = recipe
    *sections, name = setting.split(".")
    for section in sections:
        node = getattr(node, section)
    assert hasattr(node, name)
    setattr(node, name, value)


def _parse(*arguments: str) -> Recipe:
    """Return the recipe of a `train` command line."""
    return cli.recipe_of(list(arguments))[0]


def test_a_good_recipe_has_no_problems(recipe: Recipe) -> None:
    assert recipe_problems(recipe) == []


REFUSED = [
    ("seed", -1),
    ("seed", 2**32),
    ("data.train", "nowhere.jsonl"),
    ("data.eval", "nowhere.jsonl"),
    ("data.max_length", 1),
    ("data.max_truncated_share", 1.1),
    ("data.max_refused_share", -0.1),
    ("model.name_or_path", "./nowhere"),
    ("model.name_or_path", "/nowhere/at/all"),
    ("model.tokenizer", None),
    ("selfgen.replace_probability", -0.1),
    ("selfgen.replace_probability", 1.1),
    ("selfgen.replace_probability", math.nan),
    ("selfgen.schedule_share", 0.0),
    ("selfgen.schedule_share", 1.1),
    ("selfgen.passes", 0),
    ("selfgen.temperature", 0.0),
    ("selfgen.top_p", 0.0),
    ("selfgen.top_p", 1.1),
    ("selfgen.top_k", -1),
    ("selfgen.generate_command", "env {model} {prompts}"),
    ("selfgen.generate_command", ""),
    ("optim.learning_rate", -1e-5),
    ("optim.learning_rate", math.nan),
    ("optim.weight_decay", -0.1),
    ("optim.betas", (0.9, 1.0)),
    ("optim.betas", (-0.1, 0.999)),
    ("optim.epsilon", 0.0),
    ("optim.warmup_ratio", 1.1),
    ("optim.max_grad_norm", -1.0),
    ("optim.label_smoothing", -0.1),
    ("optim.dft_share", 0.0),
    ("optim.dft_share", 1.1),
    ("train.max_steps", 0),
    ("train.micro_batch_size", 0),
    ("train.gradient_accumulation_steps", 0),
    ("train.max_nonfinite_steps", 0),
    ("checkpoint.every", 0),
    ("checkpoint.keep", 0),
    # without data.eval
    ("eval.max_samples", 0),
    ("eval.batch_size", 0),
]


@pytest.mark.parametrize(("setting", "value"), REFUSED)
def test_a_bad_value_is_one_problem_that_names_setting_and_value(recipe: Recipe, setting: str, value: object) -> None:
    _set(recipe, setting, value)
    (problem,) = recipe_problems(recipe)
    assert problem.startswith(f"{setting}: expected ")
    assert problem.endswith(f", got {value!r}")


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("no-such-engine", "this host has no program 'no-such-engine'"),
        ("'env", 'No closing quotation in "\'env {model} {prompts} {answers}"'),
    ],
)
def test_a_command_that_cannot_be_run_is_refused(recipe: Recipe, program: str, problem: str) -> None:
    recipe.selfgen.generate_command = f"{program} {{model}} {{prompts}} {{answers}}"
    assert recipe_problems(recipe) == [f"selfgen.generate_command: {problem}"]


@pytest.mark.parametrize("epochs", [0.0, -1.0, math.nan, math.inf])
def test_epochs_are_a_positive_number(recipe: Recipe, epochs: float) -> None:
    recipe.train = TrainConfig(epochs=epochs, micro_batch_size=1)
    (problem,) = recipe_problems(recipe)
    assert problem.startswith("train.epochs: expected ")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("seed", 0),
        ("data.max_length", 2),
        ("data.max_truncated_share", 0.0),
        ("data.max_refused_share", 1.0),
        ("selfgen.replace_probability", 0.0),
        ("selfgen.replace_probability", 1.0),
        ("selfgen.schedule_share", 1.0),
        ("selfgen.top_p", 1.0),
        ("selfgen.passes", 1),
        ("optim.learning_rate", 0.0),
        ("optim.betas", (0.0, 0.0)),
        ("optim.max_grad_norm", 0.0),
        ("optim.warmup_ratio", 1.0),
        ("train.max_steps", 1),
        ("train.micro_batch_size", 1),
        ("eval.batch_size", 1),
    ],
)
def test_a_value_on_the_edge_of_what_is_allowed_is_no_problem(recipe: Recipe, setting: str, value: object) -> None:
    _set(recipe, setting, value)
    assert recipe_problems(recipe) == []


SOURCES = {
    "no source": ([], "expected at least one source"),
    "no file": (["a/b/c.jsonl"], "expected an existing file or folder, a hub id, or builtin:<task>, got 'a/b/c.jsonl'"),
    "empty name": ("", "got an empty string"),
    "unknown field": (["{path: a.jsonl, wieght: 3}"], "expected a source with the keys path, subset, split, weight"),
    "no folder": ("../nothing", "expected an existing file or folder"),
    "some weights": ([Source(path="a/b", weight=1.0), "c/d"], "expected a weight for every source, or for none"),
    "no share": ([Source(path="a/b", weight=0.0)], "weight: expected a number more than 0, got 0.0"),
    "split of a task": (Source(path="builtin:running_sum", split="train"), "without subsets or splits"),
    "streamed task": (Source(path="builtin:running_sum", streaming=True), "streaming is for hub data sets"),
}


@pytest.mark.parametrize(("given", "expected"), SOURCES.values(), ids=SOURCES)
def test_an_invalid_source_is_a_problem(recipe: Recipe, given: Sources, expected: str) -> None:
    recipe.data.train = given
    [problem] = recipe_problems(recipe)
    assert problem.startswith("data.train: ")
    assert expected in problem


@pytest.mark.parametrize("given", ["squad", "org/name", ["a/b", Source(path="c/d", subset="x", split="y")]])
def test_files_hub_ids_and_lists_of_them_are_sources(recipe: Recipe, given: Sources) -> None:
    recipe.data.train = given
    assert recipe_problems(recipe) == []


def test_weights_are_for_training(recipe: Recipe) -> None:
    recipe.data.eval = [Source(path="a/b", weight=1.0)]
    assert recipe_problems(recipe) == ["data.eval: weights are for data.train"]


@pytest.mark.parametrize("given", [["builtin:running_sum", "a/b"], ["a/b", Source(path="builtin:running_sum")]])
def test_tasks_and_other_rows_are_trained_together_but_not_evaluated_together(recipe: Recipe, given: Sources) -> None:
    recipe.data.train = given
    assert recipe_problems(recipe) == []
    recipe.data.eval = given
    assert recipe_problems(recipe) == ["data.eval: expected built-in tasks alone, whose recovery is measured, or none"]
    recipe.data.eval = ["builtin:running_sum", "builtin:pointer_chase"]
    assert recipe_problems(recipe) == []


def test_one_column_is_not_prompt_and_completion(recipe: Recipe) -> None:
    recipe.data.prompt_column = recipe.data.completion_column = "text"
    [problem] = recipe_problems(recipe)
    assert problem == "data.completion_column: expected another field than data.prompt_column, got 'text'"


def test_patience_needs_evaluations(recipe: Recipe) -> None:
    recipe.eval.patience = 2
    assert recipe_problems(recipe) == ["eval.patience: expected eval.every as well"]
    recipe.eval.every = 5
    assert recipe_problems(recipe) == []


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("prompt_template", "Q:", "data.prompt_template: expected a text with {prompt} in it, got 'Q:'"),
        ("date", "31.1.2026", "data.date: expected a day such as 2026-01-31, got '31.1.2026'"),
    ],
)
def test_texts_that_no_row_could_have_are_a_problem(recipe: Recipe, setting: str, value: str, problem: str) -> None:
    setattr(recipe.data, setting, value)
    assert recipe_problems(recipe) == [problem]


def test_a_project_needs_the_package_of_weights_and_biases(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfgen_ds.validation.recipe.find_spec", lambda name: None)
    recipe.wandb_project = "mine"
    [problem] = recipe_problems(recipe)
    assert problem.startswith("wandb_project: the package wandb is not installed")


def test_packed_rows_are_not_grouped_by_length(recipe: Recipe) -> None:
    recipe.data.packing = recipe.data.group_by_length = True
    assert recipe_problems(recipe) == [
        "data.group_by_length: expected false with data.packing, whose rows are all full"
    ]


def test_several_problems_are_reported_at_once(recipe: Recipe) -> None:
    for setting, value in [("seed", -1), ("selfgen.top_p", 2.0), ("train.micro_batch_size", 0), ("data.train", "./no")]:
        _set(recipe, setting, value)
    assert {problem.split(":")[0] for problem in recipe_problems(recipe)} == {
        *("seed", "selfgen.top_p", "train.micro_batch_size", "data.train")
    }


@pytest.mark.parametrize(
    "train", [TrainConfig(micro_batch_size=1), TrainConfig(epochs=1, max_steps=5, micro_batch_size=1)]
)
def test_exactly_one_of_epochs_and_max_steps_is_given(recipe: Recipe, train: TrainConfig) -> None:
    recipe.train = train
    (problem,) = recipe_problems(recipe)
    assert "train: expected either epochs or max_steps" in problem


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        (TrainConfig(epochs=1), "train: expected rows_per_step, the rows of a step on any number of ranks, or micro"),
        (TrainConfig(epochs=1, rows_per_step=0), "train.rows_per_step: expected 1 or more, got 0"),
        (
            TrainConfig(epochs=1, rows_per_step=8, gradient_accumulation_steps=2),
            "train.gradient_accumulation_steps: follows from train.rows_per_step; remove it, got 2",
        ),
    ],
)
def test_the_size_of_a_step_is_given_once(recipe: Recipe, train: TrainConfig, problem: str) -> None:
    recipe.train = train
    (told,) = recipe_problems(recipe)
    assert told.startswith(problem)


@pytest.mark.parametrize(
    ("ranks", "most", "expected"),
    [
        (8, 8, (8, 2)),
        (16, 8, (8, 1)),
        (64, 8, (2, 1)),
        (8, None, (16, 1)),
        (8, 6, (6, 3)),
        (48, 8, (3, 1)),
        (256, 8, (1, 1)),
    ],
)
def test_a_step_has_the_same_rows_on_any_number_of_ranks(
    ranks: int, most: int | None, expected: tuple[int, int]
) -> None:
    shape = TrainConfig(rows_per_step=128, micro_batch_size=most).shape(ranks)
    assert (shape.rows, shape.micro_batch_size, shape.accumulation) == (128, *expected)


def test_all_micro_batches_of_a_step_are_needed_for_its_rows_and_none_is_too_large() -> None:
    for rows, ranks, most in itertools.product(range(1, 130, 7), (1, 2, 3, 8, 64), (1, 2, 5, 8)):
        shape = TrainConfig(rows_per_step=rows, micro_batch_size=most).shape(ranks)
        assert shape.micro_batch_size <= most
        assert shape.accumulation == -(-rows // (ranks * shape.micro_batch_size))


def test_without_rows_per_step_more_ranks_have_more_rows() -> None:
    shapes = [TrainConfig(micro_batch_size=4, gradient_accumulation_steps=2).shape(ranks) for ranks in (1, 8)]
    assert [(shape.rows, shape.micro_batch_size, shape.accumulation) for shape in shapes] == [(8, 4, 2), (64, 4, 2)]


def test_a_model_is_given(recipe: Recipe) -> None:
    recipe.model = ModelConfig()
    (problem,) = recipe_problems(recipe)
    assert problem.startswith("model: expected model.name_or_path, or model.preset")


def test_evaluation_during_training_is_allowed_with_evaluation_rows(recipe: Recipe) -> None:
    recipe.data.eval, recipe.eval.every = "builtin:pointer_chase", 5
    assert recipe_problems(recipe) == []


def test_a_recipe_is_the_same_after_yaml_and_the_command_line(tmp_path: Path) -> None:
    recipe = Recipe(
        output_dir="runs/x: y",
        deepspeed="ds.json",
        data=DataConfig(train="a b.jsonl", eval="builtin:running_sum", prompt_column="yes", max_refused_share=0.25),
        model=ModelConfig(preset={"hidden_size": 8, "rope_theta": 1e-7}, tokenizer="byte", dtype="float32"),
        selfgen=SelfgenConfig(replace_probability=1e-3, schedule="inverse_sigmoid", passes=3, top_k=7),
        optim=OptimConfig(learning_rate=1e-05, betas=(0.5, 0.75), label_smoothing=0.1),
        train=TrainConfig(epochs=0.5, micro_batch_size=4, activation_checkpointing=False),
        checkpoint=CheckpointConfig(every=7, keep=1),
        eval=EvalConfig(every=3, best="recovery_4"),
        seed=42,
        resume="auto",
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(recipe))
    assert _parse("--config", str(path)) == recipe


def test_the_command_line_changes_the_recipe() -> None:
    recipe = _parse("--config", DEMO, "--selfgen.temperature", "3.5", "--optim.betas", "[0.8, 0.9]")
    assert (recipe.selfgen.temperature, recipe.optim.betas) == (3.5, (0.8, 0.9))


def test_a_model_on_the_command_line_replaces_preset_and_tokenizer() -> None:
    model = _parse("--config", DEMO, "--model.name_or_path", "some/model").model
    assert (model.name_or_path, model.preset, model.tokenizer) == ("some/model", None, None)


def test_a_model_on_the_command_line_keeps_a_tokenizer_given_there_too() -> None:
    model = _parse("--config", DEMO, "--model.name_or_path", "some/model", "--model.tokenizer", "byte").model
    assert (model.preset, model.tokenizer) == (None, "byte")


def test_a_model_in_the_recipe_keeps_the_preset_that_describes_it() -> None:
    model = _parse("--config", str(ROOT / "recipes" / "llama3-8b.yaml")).model
    assert model.name_or_path is not None
    assert model.preset is not None


@RECIPES
def test_a_shipped_recipe_has_no_problems_but_data_to_be_fetched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert [p for p in recipe_problems(_parse("--config", str(path))) if not p.startswith("data.")] == []


@RECIPES
def test_a_shipped_recipe_goes_with_every_shipped_json(path: Path) -> None:
    recipe = _parse("--config", str(path))
    for json_file in sorted((ROOT / "ds_configs").glob("*.json")):
        found = deepspeed_json.problems(recipe, ds_config.read(str(json_file)), world_size=8)
        # a feature that this machine lacks, which is checked when everything else fits
        missing = "on the CPU accelerator|nvme_path: expected a folder|libaio"
        assert [p for p in found if not re.search(missing, p)] == [], json_file.name


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Return the exit code of a command that fails before it would start anything."""
    monkeypatch.setattr("sys.argv", ["selfgen-ds", *arguments])
    monkeypatch.chdir(ROOT)
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    with pytest.raises(SystemExit) as caught:
        cli.main()
    for number, handler in handlers.items():  # a failed command ignores signals, and processes would inherit that
        signal.signal(number, handler)
    return caught.value.code


def test_bad_settings_end_with_exit_code_2_and_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, "train", "--config", DEMO, "--seed", "-1", "--train.micro_batch_size=0") == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("selfgen-ds: error: seed: ") for line in lines)
    assert any(line.startswith("selfgen-ds: error: train.micro_batch_size: ") for line in lines)


def test_the_rank_that_the_deepspeed_launcher_puts_first_is_no_sub_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, "--local_rank=0", "compare", "nowhere", "--output_dir", "out") == 2
    assert capsys.readouterr().err.startswith("selfgen-ds: error: nowhere/evaluation.json: missing")


@pytest.mark.parametrize("option", [["--selfgen.passes", "3"], ["--selfgen.passes=3"]])
def test_a_setting_that_the_method_does_not_read_is_an_error_on_the_command_line(
    option: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a setting that the recipe has for its own method is no error: the log names it
    assert _main(monkeypatch, "train", "--config", DEMO, "--seed", "-1", "--selfgen.method", "sft", *option) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "selfgen." in line and "error" in line]
    assert errors == ["selfgen-ds: error: selfgen.passes: sft does not read this setting; remove the setting"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old, and longer")
    write_atomically(path, "né")
    assert path.read_bytes() == "né".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "value"), [("every", 5), ("best", "exact_match"), ("max_samples", 3)])
def test_an_evaluation_without_rows_is_a_problem(recipe: Recipe, name: str, value: object) -> None:
    recipe.data.eval = None
    setattr(recipe.eval, name, value)
    [problem] = recipe_problems(recipe)
    assert problem == f"eval.{name}: expected data.eval to be given as well, got {value!r}"


def test_a_share_of_the_loss_dft_needs_that_loss(recipe: Recipe) -> None:
    recipe.optim.dft_share = 0.5
    assert recipe_problems(recipe) == ["optim.dft_share: expected optim.loss: dft as well"]
    recipe.optim.loss = "dft"
    assert recipe_problems(recipe) == []


def test_a_share_for_a_schedule_that_does_not_grow_is_a_problem(recipe: Recipe) -> None:
    recipe.selfgen.schedule, recipe.selfgen.schedule_share = "constant", 0.3
    [problem] = recipe_problems(recipe)
    assert problem.startswith("selfgen.schedule_share: has no effect with selfgen.schedule: constant")


@pytest.mark.parametrize(
    ("arguments", "epochs", "max_steps"),
    [(["--train.max_steps", "7"], None, 7), (["--train.epochs", "2"], 2.0, None), ([], None, 500)],
)
def test_a_length_on_the_command_line_replaces_the_recipes(
    arguments: list[str], epochs: float | None, max_steps: int | None
) -> None:
    recipe = _parse("--config", DEMO, *arguments)
    assert (recipe.train.epochs, recipe.train.max_steps) == (epochs, max_steps)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--steps", "0"], ".*steps"),
        (["--data.max_length", "8"], "data.max_length: expected 16 or more"),
        (["--config", "recipes/none.yaml"], "--config: no file 'recipes/none.yaml'"),
    ],
)
def test_bench_has_a_recipe_of_its_own_and_refuses_bad_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert _main(monkeypatch, "bench", *arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(f"selfgen-ds: error: {problem}", line)


def test_a_script_reads_a_recipe_as_train_does() -> None:
    recipe, given = cli.recipe_of(["--local_rank=1", "--config", DEMO, "--train.epochs=2", "--seed", "5"])
    assert (recipe.seed, recipe.train.epochs, recipe.train.max_steps) == (5, 2, None)
    assert given == {"config", "train.epochs", "seed"}
