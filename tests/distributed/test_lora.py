"""Adapters under real ZeRO: training, draws, checkpoints and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, set_seed

from selfgen_ds import evaluate
from selfgen_ds.checkpoint import export
from selfgen_ds.config import (
    EvaluateOptions,
    LoraConfig,
    ModelConfig,
    Recipe,
    SelfgenConfig,
    TrainConfig,
)
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.data.samples import first_rows
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.evaluation import scores
from selfgen_ds.model import head
from selfgen_ds.model.loading import build_model, model_config
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.model.reductions import places_of
from selfgen_ds.scaling.steps import count_invalidations
from selfgen_ds.setup.prepare import prepare
from tests.batches import padded
from tests.distributed import runs
from tests.distributed.test_equivalence import plain_training
from tests.distributed.test_memory import sweep_and_step_peaks
from tests.ranks import Ranks
from tests.tiers import matrix


def adapting(folder: Path, lora: LoraConfig | None = None, tied: bool = False, **changes: Any) -> Recipe:
    """Return the recipe of a run with adapters on the model in `folder/base`, which is written if it is missing."""
    if not (folder / "base").exists():
        runs.write_model(folder, tie_word_embeddings=tied)
        (folder / "model").rename(folder / "base")
    lora = lora or LoraConfig(r=4, lora_alpha=16)
    model = ModelConfig(name_or_path=str(folder / "base"), dtype="float32", lora=lora)
    return runs.recipe(folder, model=model, **changes)


def with_stage(folder: Path, stage: int) -> str:
    """Write a DeepSpeed JSON of a ZeRO stage; the limits of stage 3 really release parameters."""
    if stage == 3:
        return runs.write_limited_json(folder)
    (folder / "stage.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return str(folder / "stage.json")


def fresh_reference(settings: Recipe) -> peft.PeftModel:
    """Return the model with the adapters that the run starts from, built by `peft` alone."""
    assert settings.model.name_or_path is not None
    lora = settings.model.lora
    assert lora is not None
    model = LlamaForCausalLM.from_pretrained(settings.model.name_or_path)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        task_type="CAUSAL_LM",
    )
    set_seed(settings.seed)
    return peft.get_peft_model(model, config)


@matrix(
    ("stage", "tied", "checkpointing", "whole"),
    [
        (3, False, True, ["lm_head"]),
        (3, True, False, []),
        (2, False, True, ["embed_tokens", "model.norm"]),
        (0, True, True, []),
    ],
)
def test_training_equals_plain_torch_and_peft(
    two_ranks: Ranks, folder: Path, stage: int, tied: bool, checkpointing: bool, whole: list[str]
) -> None:
    lora = LoraConfig(r=4, lora_alpha=16, modules_to_save=whole)
    settings = adapting(folder, lora, tied=tied, deepspeed=with_stage(folder, stage))
    settings.train.activation_checkpointing = checkpointing
    results = two_ranks.run(runs.losses_parameters_contexts, settings, 4)
    reference = fresh_reference(settings)
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    losses, _, _, expected, _ = plain_training(settings, results[0][2] | results[1][2], 4, reference)
    assert results[0][0] == pytest.approx(losses, rel=1e-5)
    moved = 0
    for name, parameter in results[0][1].items():
        module, _, weight = name.rpartition(".")
        copied = f"{module}.modules_to_save.default.{weight}"  # peft trains a copy of the module
        inside = f"base_model.model.{copied if module.endswith(tuple(whole)) else name}"
        if "lora_" in name or inside.endswith(copied):
            assert torch.allclose(parameter, expected[inside], rtol=1e-4, atol=2e-4), name
            moved += not torch.equal(expected[inside], before[inside])
        else:
            assert torch.equal(parameter, before[inside]), name
    assert moved == 2 * 7 * runs.PRESET["num_hidden_layers"] + len(whole)


def base_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "base" / "model.safetensors")


def prompts_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(60).reshape(3, 20)).logits


def logits_of_a_new_run(settings: Recipe) -> torch.Tensor:
    return prompts_logits(prepare(settings, set()).engine.module)


def test_a_fresh_adapter_changes_nothing(two_ranks: Ranks, folder: Path) -> None:
    settings = adapting(folder)
    expected = prompts_logits(LlamaForCausalLM.from_pretrained(folder / "base"))
    assert all(torch.equal(logits, expected) for logits in two_ranks.run(logits_of_a_new_run, settings))


def invalidations_and_left_gathered(settings: Recipe) -> tuple[int, list[str]]:
    """Take steps, evaluate with generation, and take steps again.

    Returns:
        How often ZeRO-3 threw its trace away, and the frozen parameters that are still gathered.
    """
    run = prepare(settings, set())
    seen = count_invalidations(run.engine)
    runs.steps(run, 2)
    few = first_rows(run.samples, 3)
    scores.evaluate(run.policy, few, run.tokenizer, batch_size=2)
    runs.steps(run, 2)
    parameters = run.engine.module.named_parameters()
    left = [n for n, p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE and not p.requires_grad]
    return len(seen), left


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_trace_stays_valid_and_the_frozen_model_is_released(
    two_ranks: Ranks, folder: Path, checkpointing: bool
) -> None:
    settings = adapting(folder, deepspeed=with_stage(folder, 3))
    settings.train.activation_checkpointing = checkpointing
    assert two_ranks.run(invalidations_and_left_gathered, settings) == [(0, [])] * 2


def draw_inputs() -> tuple[list[TokenBatch], list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randint(256, (4, 40), generator=generator).tolist()
    batch = padded([row[:1] for row in contexts], [row[1:] for row in contexts], list(range(4)))
    masks = torch.rand(4, 40, generator=generator) < 0.5
    masks[:, 0] = False
    return [batch], [masks], [torch.rand(int(masks.sum()), generator=generator, dtype=torch.float64)]


def export_and_draws(settings: Recipe) -> torch.Tensor:
    run = prepare(settings, set())
    runs.steps(run, 4)
    runs.export(run, Path(settings.output_dir) / "model")
    return run.policy.draw(*draw_inputs())[0]


@pytest.mark.slow
def test_the_pass_draws_with_the_adapter_on(two_ranks: Ranks, folder: Path) -> None:
    settings = adapting(folder, LoraConfig(r=4, lora_alpha=16, lora_dropout=0.5), deepspeed=with_stage(folder, 3))
    settings.selfgen.temperature = 1.0
    drawn = two_ranks.run(export_and_draws, settings)
    expected = []
    for path in (f"{settings.output_dir}/model", str(folder / "base")):
        source = ModelConfig(name_or_path=path, dtype="float32")
        model = build_model(source, model_config(source, byte_tokenizer()))
        expected.append(EnginePolicy(model, end_tokens=[257]).draw(*draw_inputs())[0])
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], expected[0])
    assert not torch.equal(drawn[0], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "targets", "groups"), [(True, "all-linear", 6), (False, ["q_proj"], 4)])
def test_the_pass_stays_under_the_training_steps_peak(
    one_rank: Ranks, folder: Path, checkpointing: bool, targets: str | list[str], groups: int
) -> None:
    runs.write_model(folder, hidden_size=128, intermediate_size=384, num_hidden_layers=2)
    (folder / "model").rename(folder / "base")
    settings = adapting(folder, LoraConfig(target_modules=targets), deepspeed=with_stage(folder, 3))
    settings.train = TrainConfig(
        max_steps=4, micro_batch_size=8, gradient_accumulation_steps=8, activation_checkpointing=checkpointing
    )
    settings.selfgen = SelfgenConfig(replace_probability=0.9)
    sweep, step, used = one_rank.run(sweep_and_step_peaks, settings)[0]
    assert sweep <= step
    assert used == groups


def repeated(settings: Recipe) -> tuple[list[torch.Tensor], list[float]]:
    """Return two predictions and two training losses on the same batch."""
    run = prepare(settings, set())
    runs.steps(run, 2)
    batch = run.step_batches.at(2)[0]
    predictions = [run.policy.predict(batch)[1] for _ in range(2)]
    reduction = head.loss_sum(batch.target_ids[batch.loss_mask], 0.0)
    places = places_of(batch.loss_mask)
    losses = [run.engine(batch.context_ids, positions=places, reduction=reduction).item() for _ in range(2)]
    return predictions, losses


@pytest.mark.slow
def test_dropout_is_on_in_training_steps_alone(two_ranks: Ranks, folder: Path) -> None:
    settings = adapting(folder, LoraConfig(lora_dropout=0.5))
    predictions, losses = two_ranks.run(repeated, settings)[0]
    assert torch.equal(*predictions)
    assert losses[0] != losses[1]


@matrix(
    ("stage", "dtype", "tied", "exported", "whole"),
    [
        (3, "float32", True, "merged", []),
        (0, "float32", True, "merged", ["lm_head"]),
        (2, "bfloat16", True, "merged", []),
        (3, "bfloat16", False, "adapter", ["embed_tokens", "lm_head"]),
    ],
)
def test_a_resumed_run_ends_with_the_same_adapter_and_its_checkpoints_hold_and_export_it(
    two_ranks: Ranks, folder: Path, stage: int, dtype: Any, tied: bool, exported: Any, whole: list[str]
) -> None:
    file = "model.safetensors" if exported == "merged" else "adapter_model.safetensors"
    models = []
    for stops in ([2], [1, 2]):
        lora = LoraConfig(r=2, lora_dropout=0.1, modules_to_save=whole, export=exported)
        settings = adapting(folder, lora, tied=tied, resume="auto")
        settings.deepspeed, settings.model.dtype = with_stage(folder, stage), dtype
        settings.optim.schedule = "constant"
        for steps in stops:
            settings.train.max_steps = steps
            two_ranks.run(runs.run_training, settings)
        models.append((Path(settings.output_dir) / "model" / file).read_bytes())
    assert models[0] == models[1]

    last = Path(settings.output_dir) / "checkpoints" / "step-000002"
    states = [torch.load(path)["module"] for path in last.glob("*model_states.pt")]
    assert states
    names = {name for state in states for name in state if "lora_" not in name}
    ends = ("embed_tokens", "lm_head") if whole and tied else whole
    assert {name.split(".")[-2] for name in names} == set(ends)
    saved = sum(path.stat().st_size for path in last.glob("*.pt"))
    assert whole or saved < (folder / "base" / "model.safetensors").stat().st_size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "MAX_SHARD", "50KB")
        export.export_checkpoint(last, folder / "exported")
    model = Path(settings.output_dir) / "model"
    others = {path.name for path in model.iterdir()} ^ {path.name for path in (folder / "exported").iterdir()}
    assert all("safetensors" in name for name in others)
    expected, tensors = load_file(model / file), all_tensors(folder / "exported")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def trained(two_ranks: Ranks, settings: Recipe) -> Path:
    two_ranks.run(runs.run_training, settings)
    return Path(settings.output_dir) / "model"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False)])
def test_merged_and_adapter_exports_are_what_was_trained(
    two_ranks: Ranks, folder: Path, dtype: Any, tied: bool
) -> None:
    exports: dict[str, Path] = {}
    for form in ("merged", "adapter"):
        settings = adapting(folder, LoraConfig(r=4, lora_alpha=6, export=form), tied=tied)
        settings.model.dtype, settings.deepspeed = dtype, with_stage(folder, 3 if dtype == "float32" else 2)
        exports[form] = trained(two_ranks, settings)
    base = {name: tensor.to(getattr(torch, dtype)) for name, tensor in base_tensors(folder).items()}
    merged, adapter = load_file(exports["merged"] / "model.safetensors"), all_tensors(exports["adapter"])
    assert merged.keys() == base.keys()
    changed = 0
    for name, tensor in merged.items():
        factors = [adapter.get(f"base_model.model.{name.replace('.weight', f'.lora_{x}.weight')}") for x in "AB"]
        expected = base[name]
        if factors[0] is not None and factors[1] is not None:
            assert factors[0].dtype == tensor.dtype
            product = factors[1].double() @ factors[0].double() * (6 / 4)
            exact = base[name].double() + product
            assert torch.allclose(tensor.double(), exact, rtol=1e-6 if dtype == "float32" else 2**-8, atol=1e-8)
            expected = tensor
            changed += not torch.equal(tensor, base[name])
        assert torch.equal(tensor, expected), name
    assert changed == 7 * runs.PRESET["num_hidden_layers"]

    if dtype == "float32":
        wanted = prompts_logits(AutoModelForCausalLM.from_pretrained(exports["merged"]))
        started = prompts_logits(AutoModelForCausalLM.from_pretrained(folder / "base"))
        by_peft = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "base"), exports["adapter"]
        )
        for loaded in (by_peft, AutoModelForCausalLM.from_pretrained(exports["adapter"])):
            assert torch.allclose(prompts_logits(loaded), wanted, atol=1e-5)
        assert not torch.allclose(started, wanted, atol=1e-2)
        assert AutoTokenizer.from_pretrained(exports["adapter"]).eos_token == "</s>"


@pytest.mark.slow
def test_an_adapter_folder_is_evaluated_like_the_merged_model(two_ranks: Ranks, folder: Path) -> None:
    metrics = {}
    for form in ("merged", "adapter"):
        settings = adapting(folder, LoraConfig(r=4, export=form), deepspeed=with_stage(folder, 1))
        model = trained(two_ranks, settings)
        evaluate.run(
            EvaluateOptions(model=str(model), data=str(folder / "rows.jsonl"), output_dir=str(folder), max_samples=8)
        )
        metrics[form] = json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert metrics["adapter"] == pytest.approx(metrics["merged"], rel=1e-5)
    evaluate.run(
        EvaluateOptions(
            model=str(folder / "base"), data=str(folder / "rows.jsonl"), output_dir=str(folder), max_samples=8
        )
    )
    assert json.loads((folder / "evaluation.json").read_text())["metrics"]["loss"] > metrics["adapter"]["loss"] + 0.1

    (folder / "base").rename(folder / "moved")
    with pytest.raises(InputError, match=r"model: the adapter's base model .*base no longer exists"):
        evaluate.run(EvaluateOptions(model=str(model), data=str(folder / "rows.jsonl"), output_dir=str(folder)))


@pytest.mark.slow
def test_a_checkpoint_whose_base_is_gone_is_not_merged(two_ranks: Ranks, folder: Path) -> None:
    settings = adapting(folder, deepspeed=with_stage(folder, 1))
    trained(two_ranks, settings)
    (folder / "base").rename(folder / "moved")
    with pytest.raises(InputError, match=r"step-000004: the adapter's base model .*base no longer exists"):
        export.export_checkpoint(Path(settings.output_dir) / "checkpoints" / "step-000004", folder / "exported")
    assert not (folder / "exported").exists()
