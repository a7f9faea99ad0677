"""Check the reading, checking, and filling of the DeepSpeed JSON."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import wandb

from selfgen_ds.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    TrainConfig,
)
from selfgen_ds.engine import ds_config
from selfgen_ds.errors import InputError
from selfgen_ds.validation import deepspeed_json

WORLD_SIZE, HIDDEN_SIZE = 4, 100
ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3}}


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        output_dir="runs/x",
        deepspeed="ds.json",
        data=DataConfig(train="builtin:pointer_chase"),
        model=ModelConfig(preset={}, tokenizer="byte", dtype="bfloat16"),
        optim=OptimConfig(learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-6, max_grad_norm=0.5),
        train=TrainConfig(max_steps=10, micro_batch_size=2, gradient_accumulation_steps=3),
    )


def _problem(recipe: Recipe, config: dict[str, Any]) -> str:
    (problem,) = deepspeed_json.problems(recipe, config, WORLD_SIZE)
    assert problem.startswith("ds.json: ")
    return problem


def _read(tmp_path: Path, content: bytes) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    return ds_config.read(str(path))


def test_a_json_object_is_read(tmp_path: Path) -> None:
    assert _read(tmp_path, b'{"zero_optimization": {"stage": 3}}') == ZERO3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{\n "a": 1,\n "b": \n}', "ds.json, line 4: malformed JSON"),
        (b"[]", "ds.json: expected a JSON object, got list"),
        (b'{"a": "\xff"}', "ds.json: 'utf-8' codec"),
    ],
)
def test_a_file_without_a_json_object_is_an_error_that_names_it(tmp_path: Path, content: bytes, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        _read(tmp_path, content)
    assert str(caught.value).startswith(f"deepspeed: {tmp_path}")
    assert expected in str(caught.value)


def test_a_missing_json_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"deepspeed: no file '{tmp_path}/ds.json'; the packaged JSONs are zero2, "):
        ds_config.read(f"{tmp_path}/ds.json")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_json_with_nothing_but_a_stage_has_no_problems(recipe: Recipe, stage: int) -> None:
    assert deepspeed_json.problems(recipe, {"zero_optimization": {"stage": stage}}, WORLD_SIZE) == []


@pytest.mark.parametrize("stage", [4, -1, "3", "auto", None])
def test_an_unknown_stage_is_refused(recipe: Recipe, stage: object) -> None:
    assert _problem(recipe, {"zero_optimization": {"stage": stage}}).startswith("ds.json: zero_optimization.stage: ")


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"stage": 0}}], ids=["no section", "0"])
def test_no_zero_at_all_is_for_float32(recipe: Recipe, config: dict[str, Any]) -> None:
    assert _problem(recipe, config).startswith(
        "ds.json: zero_optimization.stage: expected one of (1, 2, 3) for bfloat16"
    )
    recipe.model.dtype = "float32"
    assert deepspeed_json.problems(recipe, config, WORLD_SIZE) == []


def test_unknown_keys_are_named_together_with_the_nearest_known_one(recipe: Recipe) -> None:
    zero = {"stage": 3, "stage3_max_live_paramters": 1e9}
    unknown = "unknown key: DeepSpeed does not read it"
    assert deepspeed_json.problems(recipe, {"zero_optimization": zero, "zero_optimisation": {}}, WORLD_SIZE) == [
        f"ds.json: zero_optimization.stage3_max_live_paramters: {unknown}; did you mean stage3_max_live_parameters?",
        f"ds.json: zero_optimisation: {unknown}; did you mean zero_optimization?",
    ]


def test_a_value_of_another_type_is_named_with_its_key(recipe: Recipe) -> None:
    problem = _problem(recipe, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "large"}})
    assert "zero_optimization.reduce_bucket_size" in problem
    assert "'large'" in problem


def test_a_key_inside_a_section_of_zero_optimization_is_named(recipe: Recipe) -> None:
    problem = _problem(recipe, {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "gpu"}}})
    assert "zero_optimization.offload_optimizer.device" in problem


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled: expected false"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast.enabled: expected false"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: expected none; optim.schedule"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint: expected none; the run decides"),
        ({"datastates_ckpt": {"host_cache_size": 16}}, "datastates_ckpt: expected none; the run decides"),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            r"activation_checkpointing\.partition_activations: has no effect on Hugging Face models",
        ),
        (
            {"activation_checkpointing": {"cpu_checkpointing": "yes"}},
            "activation_checkpointing.cpu_checkpointing: expected true or false, got 'yes'",
        ),
        ({"optimizer": {"type": "Adam"}}, "optimizer.type: expected 'AdamW', got 'Adam'"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}}},
            r"zero_optimization\.offload_optimizer\.device: expected 'cpu' or 'none', got 'nvme'; .*checkpoints",
        ),
    ],
)
def test_what_the_recipe_decides_is_refused_in_the_json(recipe: Recipe, config: dict[str, Any], expected: str) -> None:
    assert re.search(expected, _problem(recipe, ZERO3 | config))


def test_cpu_checkpointing_is_for_recipes_with_activation_checkpointing(recipe: Recipe) -> None:
    config = ZERO3 | {"activation_checkpointing": {"cpu_checkpointing": True}}
    assert deepspeed_json.problems(recipe, config, WORLD_SIZE) == []
    assert ds_config.offloads_activations(config)
    recipe.train.activation_checkpointing = False
    assert _problem(recipe, config) == (
        "ds.json: activation_checkpointing.cpu_checkpointing: true, but train.activation_checkpointing is false"
    )
    off = ZERO3 | {"activation_checkpointing": {"cpu_checkpointing": False}}
    assert deepspeed_json.problems(recipe, off, WORLD_SIZE) == []
    assert not ds_config.offloads_activations(off)


@pytest.mark.parametrize(
    ("config", "key", "setting"),
    [
        ({"train_batch_size": 25}, "train_batch_size=25", "4 ranks=24"),
        ({"train_micro_batch_size_per_gpu": 5}, "train_micro_batch_size_per_gpu=5", "train.micro_batch_size=2"),
        ({"gradient_accumulation_steps": 5}, "gradient_accumulation_steps=5", "train.gradient_accumulation_steps=3"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0", "optim.max_grad_norm=0.5"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=False", "model.dtype"),
        ({"optimizer": {"params": {"lr": 3e-4}}}, "optimizer.params.lr=0.0003", "optim.learning_rate=0.0001"),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, "optimizer.params.betas", "optim.betas"),
        ({"optimizer": {"params": {"eps": 1e-8}}}, "optimizer.params.eps=1e-08", "optim.epsilon=1e-06"),
        ({"optimizer": {"params": {"weight_decay": 0}}}, "optimizer.params.weight_decay=0", "optim.weight_decay=0.1"),
    ],
)
def test_a_value_that_differs_from_the_recipes_names_both(
    recipe: Recipe, config: dict[str, Any], key: str, setting: str
) -> None:
    problem = _problem(recipe, ZERO3 | config)
    assert key in problem
    assert setting in problem


def test_batch_sizes_may_be_those_of_the_ranks_that_a_run_was_started_with(recipe: Recipe) -> None:
    config = ZERO3 | {"train_batch_size": 24, "gradient_accumulation_steps": 3, "train_micro_batch_size_per_gpu": 2}
    assert len(deepspeed_json.problems(recipe, config, 7)) == 1
    assert deepspeed_json.problems(recipe, config, 7, first_ranks=WORLD_SIZE) == []
    recipe.train.gradient_accumulation_steps = 2  # computed anew: 7 ranks need 2 micro-batches of 2 rows to hold 24
    resolved = ds_config.resolve(recipe, config, 7, HIDDEN_SIZE).config
    assert [resolved[key] for key in config if key != "zero_optimization"] == [28, 2, 2]


def test_values_equal_to_the_recipes_are_no_problem(recipe: Recipe) -> None:
    config = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}},
    }
    assert deepspeed_json.problems(recipe, ZERO3 | config, WORLD_SIZE) == []


@pytest.mark.parametrize("key", ["steps_per_print", "zero_optimization.stage3_max_live_parameters"])
def test_an_auto_that_no_setting_decides_is_refused(recipe: Recipe, key: str) -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    section, name = config, key
    if key.startswith("zero_optimization."):
        section, name = config["zero_optimization"], key.removeprefix("zero_optimization.")
    section[name] = "auto"
    assert _problem(recipe, config) == f'ds.json: {key}: "auto", but no setting of the recipe decides it'


def test_several_problems_are_reported_at_once(recipe: Recipe) -> None:
    config = {"zero_optimization": {"stage": 7}, "fp16": {"enabled": True}, "train_batch_size": 1, "scheduler": {}}
    assert len(deepspeed_json.problems(recipe, config, WORLD_SIZE)) == 4


def test_shards_of_a_node_need_ranks_that_they_divide(recipe: Recipe) -> None:
    def problems(size: int, ranks: int) -> list[str]:
        return deepspeed_json.problems(
            recipe, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": size}}, ranks
        )

    assert problems(2, 4) == problems(8, 4) == problems(8, 16) == []  # a larger size means all ranks
    assert problems(4, 6) == [
        "ds.json: zero_optimization.zero_hpz_partition_size: expected a divisor of the 6 ranks, got 4"
    ]


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_quantized_communication_is_refused_on_the_cpu_accelerator(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    config = {"zero_optimization": {"stage": 3, key: True}}
    assert _problem(recipe, config) == (
        f"ds.json: zero_optimization.{key}: DeepSpeed has no quantization on the CPU accelerator"
    )
    monkeypatch.setattr(deepspeed_json.get_accelerator(), "device_name", lambda: "cuda")
    assert deepspeed_json.problems(recipe, config, WORLD_SIZE) == []


def test_nvme_needs_a_folder_and_libaio(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def problems(**section: str) -> list[str]:
        zero = {"stage": 3, "offload_param": {"device": "nvme", **section}}
        return deepspeed_json.problems(recipe, {"zero_optimization": zero}, WORLD_SIZE)

    monkeypatch.setattr(deepspeed_json.AsyncIOBuilder, "is_compatible", lambda self: True)
    name = "ds.json: zero_optimization.offload_param"
    assert problems() == [f"{name}.nvme_path: expected a folder, got None"]
    missing = f"{tmp_path}/none"
    assert problems(nvme_path=missing) == [f"{name}.nvme_path: expected a folder, got {missing!r}"]
    assert problems(nvme_path=str(tmp_path)) == []
    monkeypatch.setattr(deepspeed_json.AsyncIOBuilder, "is_compatible", lambda self: False)
    assert problems(nvme_path=str(tmp_path)) == [
        f"{name}.device: nvme needs libaio and its headers (Debian: apt-get install libaio-dev)"
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": 3},
        {"zero_optimization": None},
        ZERO3 | {"fp16": "auto"},
        ZERO3 | {"bf16": True},
        ZERO3 | {"activation_checkpointing": True},
        ZERO3 | {"optimizer": "AdamW"},
        ZERO3 | {"optimizer": {"type": "AdamW", "params": "auto"}},
    ],
    ids=str,
)
def test_a_value_where_a_section_belongs_is_a_problem_that_names_it(recipe: Recipe, config: dict[str, Any]) -> None:
    name = [*config][-1]
    assert any(name in problem for problem in deepspeed_json.problems(recipe, config, WORLD_SIZE))


def test_every_auto_is_filled_from_the_recipe(recipe: Recipe) -> None:
    autos: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
    }
    resolved = ds_config.resolve(recipe, autos, WORLD_SIZE, HIDDEN_SIZE)
    filled = resolved.config
    assert filled["train_batch_size"] == 2 * 3 * 4
    assert (filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"]) == (2, 3)
    assert filled["gradient_clipping"] == 0.5
    assert (filled["bf16"], filled["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert filled["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 1 << 20,
        "stage3_prefetch_bucket_size": 9_000,
        "stage3_param_persistence_threshold": 1_000,
    }
    optimizer = filled["optimizer"]["params"]
    assert (optimizer["lr"], optimizer["betas"]) == (1e-4, [0.9, 0.95])
    assert (optimizer["eps"], optimizer["weight_decay"]) == (1e-6, 0.1)


def test_the_buckets_of_a_large_model_are_the_square_of_its_hidden_size(recipe: Recipe) -> None:
    config = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    assert (
        ds_config.resolve(recipe, config, WORLD_SIZE, 4096).config["zero_optimization"]["reduce_bucket_size"] == 4096**2
    )


def test_what_the_json_leaves_out_is_filled_from_the_recipe(recipe: Recipe) -> None:
    resolved = ds_config.resolve(recipe, ZERO3, WORLD_SIZE, HIDDEN_SIZE)
    filled = resolved.config
    assert (filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"]) == (2, 3)
    assert (filled["gradient_clipping"], filled["bf16"]) == (0.5, {"enabled": True})
    assert (filled["optimizer"]["type"], filled["optimizer"]["params"]["lr"]) == ("AdamW", 1e-4)


def test_a_float32_model_turns_bf16_off(recipe: Recipe) -> None:
    recipe.model.dtype = "float32"
    resolved = ds_config.resolve(recipe, ZERO3 | {"bf16": {"enabled": "auto"}}, WORLD_SIZE, HIDDEN_SIZE)
    assert resolved.config["bf16"] == {"enabled": False}


def test_what_the_json_says_is_kept(recipe: Recipe) -> None:
    config = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 77},
        "tensorboard": {"enabled": False, "output_path": "elsewhere"},
        "steps_per_print": 5,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": False}},
    }
    resolved = ds_config.resolve(recipe, config, WORLD_SIZE, HIDDEN_SIZE)
    filled = resolved.config
    assert filled["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 77}
    monitor = filled["tensorboard"]
    assert (monitor["enabled"], monitor["output_path"], filled["steps_per_print"]) == (False, "elsewhere", 5)
    assert filled["optimizer"]["params"]["torch_adam"] is False


@pytest.mark.parametrize("monitor", ["tensorboard", "csv_monitor"])
def test_a_monitor_writes_into_the_runs_folder(recipe: Recipe, monitor: str) -> None:
    config = {"zero_optimization": {"stage": 3}, monitor: {"enabled": True}}
    filled = ds_config.resolve(recipe, config, WORLD_SIZE, HIDDEN_SIZE).config
    assert (filled[monitor]["output_path"], filled[monitor]["job_name"]) == (recipe.output_dir, monitor)


def test_a_monitor_whose_package_is_missing_is_named(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_json, "find_spec", lambda name: None)
    config = {"zero_optimization": {"stage": 3}, "wandb": {"enabled": True}}
    assert "the package wandb is not installed" in _problem(recipe, config)


@pytest.fixture(autouse=True)
def wandb_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back the variables that a recipe with a project sets: later ranks of this process would inherit them."""
    for name in ("WANDB_NAME", "WANDB_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_project_of_the_recipe_turns_weights_and_biases_on(recipe: Recipe) -> None:
    recipe.wandb_project, recipe.run_name = "mine", "first"
    filled = ds_config.resolve(recipe, {"zero_optimization": {"stage": 3}}, WORLD_SIZE, HIDDEN_SIZE).config
    assert filled["wandb"] == {"enabled": True, "project": "mine"}
    assert (os.environ["WANDB_NAME"], os.environ["WANDB_DIR"]) == ("first", recipe.output_dir)


def test_another_project_of_the_json_is_named(recipe: Recipe) -> None:
    recipe.wandb_project = "mine"
    config = {"zero_optimization": {"stage": 3}, "wandb": {"enabled": True, "project": "other"}}
    assert "wandb.project=other differs from the recipe: wandb_project=mine" in _problem(recipe, config)


@pytest.mark.test
@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({}, "wandb_project: No API key configured. Use `wandb login` to log in. WANDB_MODE=offline needs no login"),
        ({"WANDB_MODE": "offline"}, ""),
        ({"WANDB_MODE": "disabled"}, ""),
    ],
)
def test_a_project_needs_a_login(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], problem: str
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # settings that an earlier test read
    assert deepspeed_json.login_problem(recipe, {}) == ""
    recipe.wandb_project = "mine"
    assert deepspeed_json.login_problem(recipe, {}) == problem
    wandb.teardown()


def test_the_json_read_is_left_as_it_was(recipe: Recipe) -> None:
    config: dict[str, Any] = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "bf16": {"enabled": "auto"},
    }
    deepspeed_json.problems(recipe, config, WORLD_SIZE)
    ds_config.resolve(recipe, config, WORLD_SIZE, HIDDEN_SIZE)
    assert config == {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "bf16": {"enabled": "auto"}}


@pytest.mark.parametrize(
    ("zero", "problem"),
    [
        ({"stage": 3, "offload_param": "nvme"}, "zero_optimization.offload_param: expected an object, got 'nvme'"),
        ({"stage": 3, "offload_optimizer": ["cpu"]}, "zero_optimization.offload_optimizer: expected an object"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "zero_optimization.offload_param: has no effect before"),
        ({"stage": 2, "zero_hpz_partition_size": 2}, "zero_optimization.zero_hpz_partition_size: has no effect before"),
    ],
)
def test_sections_of_another_type_or_stage_are_named(recipe: Recipe, zero: dict[str, Any], problem: str) -> None:
    [line] = deepspeed_json.problems(recipe, {"zero_optimization": zero}, world_size=2)
    assert problem in line
