"""Adapters under real ZeRO: what is trained, drawn from, saved and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, set_seed

from selfgen_ds.config import LoraConfig, ModelConfig, Recipe
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.engine import export, head
from selfgen_ds.engine.model import build_model, model_config
from selfgen_ds.engine.policy import EnginePolicy
from selfgen_ds.prepare import prepare
from tests.distributed import runs
from tests.distributed.test_equivalence import plain_training
from tests.distributed.test_trace import invalidations
from tests.ranks import Ranks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs.write_rows(tmp_path)
    return tmp_path


def adapting(folder: Path, lora: LoraConfig | None = None, tied: bool = False, **changes: Any) -> Recipe:
    """A run with adapters on the model in `folder/base`."""
    if not (folder / "base").exists():
        runs.write_model(folder, tie_word_embeddings=tied)
        (folder / "model").rename(folder / "base")
    lora = lora or LoraConfig(r=4, lora_alpha=16)
    model = ModelConfig(name_or_path=str(folder / "base"), dtype="float32", lora=lora)
    return runs.recipe(folder, model=model, **changes)


def with_stage(folder: Path, stage: int) -> str:
    (folder / "stage.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return str(folder / "stage.json")


def fresh_reference(settings: Recipe) -> peft.PeftModel:
    """The model with the adapters that the run starts from, by `peft` alone."""
    assert settings.model.name_or_path is not None
    lora = settings.model.lora
    assert lora is not None
    model = LlamaForCausalLM.from_pretrained(settings.model.name_or_path)
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"
    )
    set_seed(settings.seed)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize(
    ("stage", "tied", "checkpointing"),
    [(3, False, True), (3, True, False), (2, False, True), (1, True, True), (0, False, False)],
)
def test_training_equals_plain_torch_and_peft(
    two_ranks: Ranks, folder: Path, stage: int, tied: bool, checkpointing: bool
) -> None:
    settings = adapting(folder, tied=tied, deepspeed=with_stage(folder, stage))
    settings.train.activation_checkpointing = checkpointing
    results = two_ranks.run(runs.losses_parameters_contexts, settings, 4)
    reference = fresh_reference(settings)
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    losses, _, _, expected = plain_training(settings, results[0][2] | results[1][2], 4, reference)
    assert results[0][0] == pytest.approx(losses, rel=1e-5)
    moved = 0
    for name, parameter in results[0][1].items():
        wanted = expected[f"base_model.model.{name}"]
        if "lora_" in name:
            assert torch.allclose(parameter, wanted, rtol=1e-4, atol=2e-4), name
            moved += not torch.equal(wanted, before[f"base_model.model.{name}"])
        else:
            assert torch.equal(parameter, before[f"base_model.model.{name}"]), name
    assert moved == 2 * 7 * 3


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


def test_steps_and_evaluations_never_invalidate_the_trace(two_ranks: Ranks, folder: Path) -> None:
    for checkpointing in (True, False):
        settings = adapting(folder, deepspeed=runs.write_limited_json(folder))
        settings.train.activation_checkpointing = checkpointing
        assert two_ranks.run(invalidations, settings, True) == [0, 0]


def parameters_left_gathered(settings: Recipe) -> list[str]:
    run = prepare(settings, set())
    runs.steps(run, 2)
    left = [n for n, p in run.engine.module.named_parameters() if p.ds_status == ZeroParamStatus.AVAILABLE]
    return [name for name in left if "lora_" not in name]


def test_the_backward_releases_what_it_gathered(two_ranks: Ranks, folder: Path) -> None:
    for checkpointing in (True, False):
        settings = adapting(folder, deepspeed=runs.write_limited_json(folder))
        settings.train.activation_checkpointing = checkpointing
        assert two_ranks.run(parameters_left_gathered, settings) == [[], []]


def draw_inputs() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randint(256, (4, 40), generator=generator)
    masks = torch.rand(4, 40, generator=generator) < 0.5
    masks[:, 0] = False
    return [contexts], [masks], [torch.rand(int(masks.sum()), generator=generator, dtype=torch.float64)]


def draws_and_export(settings: Recipe) -> torch.Tensor:
    run = prepare(settings, set())
    runs.steps(run, 4)
    drawn = run.policy.draw(*draw_inputs())[0]
    export.export_engine(run.engine, Path(settings.output_dir) / "model", run.tokenizer, settings.model.lora)
    return drawn


def test_the_pass_draws_with_the_adapter_on(two_ranks: Ranks, folder: Path) -> None:
    settings = adapting(folder, LoraConfig(r=4, lora_alpha=16, lora_dropout=0.5))
    settings.selfgen.temperature = 1.0
    drawn = two_ranks.run(draws_and_export, settings)
    found = []
    for path in (f"{settings.output_dir}/model", str(folder / "base")):
        source = ModelConfig(name_or_path=path, dtype="float32")
        model = build_model(source, model_config(source, byte_tokenizer()))
        found.append(EnginePolicy(model, model, end_token=257).draw(*draw_inputs())[0])
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], found[0])
    assert not torch.equal(drawn[0], found[1])


def repeated(settings: Recipe) -> tuple[list[torch.Tensor], list[float]]:
    """Two predictions and two training losses on the same batch."""
    run = prepare(settings, set())
    runs.steps(run, 2)
    batch = run.windows.window(2)[0]
    predictions = [run.policy.predict(batch)[1] for _ in range(2)]
    reduction = head.loss_sum(batch.target[batch.loss_mask], 0.0)
    losses = [run.engine(batch.context, positions=batch.loss_mask, reduction=reduction).item() for _ in range(2)]
    return predictions, losses


def test_dropout_is_on_in_training_steps_alone(two_ranks: Ranks, folder: Path) -> None:
    settings = adapting(folder, LoraConfig(lora_dropout=0.5))
    predictions, losses = two_ranks.run(repeated, settings)[0]
    assert torch.equal(*predictions)
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("stage", "dtype", "tied"),
    [(0, "float32", True), (1, "bfloat16", False), (2, "bfloat16", True), (3, "float32", True), (3, "bfloat16", False)],
)
@pytest.mark.parametrize("exported", ["merged", "adapter"])
def test_a_resumed_run_ends_alike_and_its_checkpoints_hold_and_export_the_adapter(
    two_ranks: Ranks, folder: Path, stage: int, dtype: Any, tied: bool, exported: Any
) -> None:
    if exported == "adapter" and (stage, dtype) not in ((0, "float32"), (3, "bfloat16")):
        pytest.skip("stages differ in checkpoints, not in the form of what is exported")
    found = []
    file = "model.safetensors" if exported == "merged" else "adapter_model.safetensors"
    for stops in ([4], [2, 4]):
        settings = adapting(folder, LoraConfig(r=2, lora_dropout=0.1, export=exported), tied=tied, resume="auto")
        settings.deepspeed, settings.model.dtype = with_stage(folder, stage), dtype
        settings.optim.schedule = "constant"
        for steps in stops:
            settings.train.max_steps = steps
            two_ranks.run(runs.run_training, settings)
        found.append((Path(settings.output_dir) / "model" / file).read_bytes())
    assert found[0] == found[1]

    last = Path(settings.output_dir) / "checkpoints" / "step-000004"
    states = [torch.load(p)["module"] for p in last.glob("*model_states.pt")]
    assert states
    assert all("lora_" in name for state in states for name in state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "MAX_SHARD", "1GB" if exported == "adapter" else "50KB")
        export.export_checkpoint(last, folder / "exported")
    names = {path.name for path in (folder / "exported").iterdir()} ^ {
        p.name for p in Path(settings.output_dir, "model").iterdir()
    }
    assert all("safetensors" in name for name in names)
    expected = load_file(Path(settings.output_dir) / "model" / file)
    tensors = {n: t for p in (folder / "exported").glob("*.safetensors") for n, t in load_file(p).items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
