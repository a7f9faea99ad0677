"""The command line: launchers that train the same, refusals and their exit code, and a real data set."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfgen_ds import __version__, cli
from selfgen_ds.errors import InputError
from selfgen_ds.train import train as run_train
from tests.distributed import runs
from tests.distributed.launched import Left
from tests.forked import Run, command
from tests.ranks import ROOT, SHARED, Launched, Ranks, deepspeed, free_port

BIN = Path(sys.executable).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs.write_rows(tmp_path)
    (tmp_path / "recipe.yaml").write_text(runs.YAML.format(folder=tmp_path))
    return tmp_path


def train(folder: Path, *overrides: str) -> list[str]:
    return ["train", "--config", str(folder / "recipe.yaml"), *overrides]


LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "-m", "selfgen_ds"],
    "one process": [sys.executable, "-m", "selfgen_ds"],
}


@pytest.mark.slow
def test_every_launcher_trains_the_same(folder: Path, launched: Left) -> None:
    found = {"deepspeed": runs.losses(launched.folder)}
    assert "2 ranks" in launched.output
    for name, launcher in LAUNCHERS.items():
        ranks = 1 if name == "one process" else 2
        micro = ["--train.micro_batch_size", str(4 // ranks), "--output_dir", str(folder / name / "run")]
        if name == "torchrun":
            launcher = [launcher[0], "--master_port", str(free_port()), *launcher[1:]]
        with Launched([*launcher, *train(folder, *micro)], folder / "log") as run:
            assert run.wait() == 0, run.output()[-3000:]
        found[name] = runs.losses(folder / name / "run")
        assert f"{ranks} rank{'s' if ranks > 1 else ''}, from the start" in run.output()
    for name, values in found.items():
        assert values == pytest.approx(found["one process"], rel=1e-5), name


def test_a_command_s_output_arrives_without_a_terminal() -> None:
    done = subprocess.run([BIN / "selfgen-ds", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"selfgen-ds {__version__}\n"


def error_lines(output: str) -> list[str]:
    """Return what follows `selfgen-ds: error: ` in the output of a command, in which no traceback may be."""
    assert "Traceback" not in output
    start = "selfgen-ds: error: "
    return [line.removeprefix(start) for line in output.splitlines() if line.startswith(start)]


def test_a_refusal_is_exit_code_2_and_one_line_that_usage_does_not_bury(folder: Path) -> None:
    command = [*LAUNCHERS["one process"], *train(folder, "--optim.learning_rat", "3")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    line = "--optim.learning_rat: no such setting; did you mean --optim.learning_rate?"
    assert done.stderr == f"selfgen-ds: error: {line}\n"


@pytest.mark.slow
def test_bad_rows_stop_both_ranks_of_a_launched_run(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("[]\n")
    with deepspeed(train(folder), folder / "log") as run:
        assert run.wait() == 2
    [line] = error_lines(run.output())
    rows = f"{folder}/rows.jsonl"
    assert line == f"{rows}: no usable row among 1: {rows}, line 1: expected one JSON object, got list"


def refusal(arguments: list[str]) -> list[str]:
    """Train as `selfgen-ds ARGUMENTS` does, and return the lines of the `InputError` that ends the command."""
    recipe, overrides = cli.recipe_of(arguments[1:])
    with pytest.raises(InputError) as caught:
        run_train(recipe, overrides)
    return str(caught.value).splitlines()


@pytest.fixture
def refused(one_rank: Ranks, folder: Path) -> Callable[..., str]:
    """Return the only line with which a run of the recipe, changed by these options, ends before its first step."""

    def line_of(*overrides: str) -> str:
        [[line]] = one_rank.run(refusal, train(folder, *overrides))
        assert not (folder / "run" / "metrics.jsonl").exists()
        return line

    return line_of


def test_rows_without_room_for_a_response_are_one_clear_line(folder: Path, refused: Callable[..., str]) -> None:
    rows = [{"prompt": prompt, "completion": "b"} for prompt in ("a", "a" * 128)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "line 2: the prompt leaves no room for a response" in refused()


HUGE = '{"hidden_size": 262144, "intermediate_size": 1048576, "num_hidden_layers": 20, "num_attention_heads": 64}'


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["--data.train", "builtin:none"],
            "data.train: unknown task 'none'; the built-in tasks are builtin:pointer_chase, builtin:running_sum",
        ),
        (
            ["--selfgen.method", "none"],
            "selfgen.method: expected one of sft, scheduled_sampling, bash, rac, noise, own_samples, or module:Class, "
            "got 'none'",
        ),
        (["--selfgen.method", "sft", "--selfgen.top_p", "0.5"], "selfgen.top_p: sft does not read this setting"),
        (["--checkpoint.every", "0"], "checkpoint.every: expected 1 or more, got 0"),
        (["--model.preset", HUGE], "output_dir: a checkpoint takes"),
        (["--model.preset", '{"hidden_size": 0}'], "model"),
        (["--data.max_length", "100000"], "data.max_length: expected at most the model's 2048 positions"),
        (["--data.eval", "builtin:pointer_chase", "--eval.best", "ter"], "eval.best: expected one of"),
        (["--data.eval", "builtin:pointer_chase", "--eval.best", "bleu"], "eval.best: bleu needs references with two"),
    ],
)
def test_bad_settings_are_one_clear_line(refused: Callable[..., str], overrides: list[str], expected: str) -> None:
    assert expected in refused(*overrides)


def test_all_problems_of_recipe_and_json_are_named_at_once(one_rank: Ranks, folder: Path) -> None:
    sizes = {"train_batch_size": 3, "zero_optimization": {"stage": 3}, "gradient_clipping": 7.0}
    (folder / "ds.json").write_text(json.dumps(sizes))
    overrides = ["--deepspeed", str(folder / "ds.json"), "--selfgen.top_p", "2"]
    overrides += ["--train.epochs", "1", "--train.max_steps", "2"]
    [lines] = one_rank.run(refusal, train(folder, *overrides))
    for expected in (
        "ds.json: train_batch_size=3 differs from the recipe: train.micro_batch_size",
        "ds.json: gradient_clipping=7.0 differs from the recipe: optim.max_grad_norm=1.0",
        "selfgen.top_p: expected a probability mass in (0, 1], got 2.0",
        "train: expected either epochs or max_steps, got 1.0 and 2",
    ):
        assert any(expected in line for line in lines), lines


def test_an_invalid_output_folder_is_one_clear_line(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "file").write_text("")
    assert "output_dir: " in refused("--output_dir", str(folder / "file" / "below"))
    assert "cannot be written to" in refused("--output_dir", str(folder / "file"))


def test_a_checkpoint_is_not_taken_for_a_model(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "complete.json").write_text("{}")
    assert "is a checkpoint; `selfgen-ds export`" in refused("--model.name_or_path", str(folder))


def test_a_folder_that_holds_a_run_is_not_overwritten(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("{}")
    assert "holds a run already" in refused()


def test_a_port_that_is_no_number_is_one_clear_line(folder: Path) -> None:
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}
    assert command(train(folder), folder / "log", rank) == 2
    assert error_lines((folder / "log").read_text()) == ["MASTER_PORT: expected a port, got 'x'"]


def test_a_second_run_in_the_same_folder_is_refused(folder: Path) -> None:
    first = Run(train(folder, "--train.max_steps", "100000"), folder, ranks=1)
    try:
        first.until((folder / "run" / "metrics.jsonl").exists)
        assert command(train(folder, "--resume", "auto"), folder / "second") == 2
        assert "output_dir: another run is writing to" in (folder / "second").read_text()
        assert first.processes[0].is_alive()
    finally:
        first.kill()


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the real GSM8K file is not here (../shared/data)")
def test_gsm8k_is_trained_on_killed_resumed_exported_and_loaded(folder: Path) -> None:
    out = folder / "gsm8k"
    arguments = [
        *("train", "--config", "recipes/gsm8k.yaml", "--data.train", str(SHARED / "data" / "gsm8k" / "train.jsonl")),
        *("--output_dir", str(out), "--train.max_steps", "8", "--checkpoint.every", "1", "--checkpoint.keep", "8"),
        *("--train.gradient_accumulation_steps", "1", "--train.micro_batch_size", "2", "--resume", "auto"),
    ]
    run = Run(arguments, folder)
    run.until((out / "checkpoints" / "step-000002" / "complete.json").exists)
    run.kill()
    assert "7473 samples (182 truncated, 0 refused)" in run.output(0)
    assert not (out / "model").exists()
    run = Run(arguments, folder)
    assert run.wait() == [0, 0], run.output(0)[-3000:]
    assert "resumed from" in run.output(0)
    export = ["export", "--checkpoint", str(out / "checkpoints" / "step-000008"), "--output_dir", str(out / "exported")]
    assert command(export, folder / "log") == 0, (folder / "log").read_text()[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(out / "exported")
    prompt = tokenizer("How many apples?", return_tensors="pt")
    models = [AutoModelForCausalLM.from_pretrained(out / name) for name in ("model", "exported")]
    answers = [model.generate(**prompt, max_new_tokens=8, do_sample=False) for model in models]
    assert answers[0].shape[1] > 16
    assert torch.equal(*answers)
