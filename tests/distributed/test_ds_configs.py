"""Check each JSON in `ds_configs/`: it has a row in docs/deepspeed.md, is valid, and trains on real ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed.comm
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.cpp_extension import _get_build_directory

from selfgen_ds.checkpoint.export import export_checkpoint
from selfgen_ds.config import CheckpointConfig, ModelConfig, Recipe, SelfgenConfig
from selfgen_ds.engine import ds_config
from selfgen_ds.engine.step import train_step
from selfgen_ds.model import loading
from selfgen_ds.setup.prepare import prepare
from selfgen_ds.validation import deepspeed_json
from tests.distributed import runs
from tests.ranks import ROOT, Ranks
from tests.tiers import matrix

FOLDER = ROOT / "ds_configs"
FILES = sorted(path.name for path in FOLDER.glob("*.json"))
NOT_ON_CPU = {"zero3_quantized.json": "zero_optimization.zero_quantized_weights: DeepSpeed has no quantization"}
ON_HOST = ("zero3_offload.json", "zero3_infinity.json")  # JSONs whose optimizer runs on the host
WIDE = runs.PRESET | {"hidden_size": 128, "intermediate_size": 4096, "num_hidden_layers": 2}
BASH = SelfgenConfig(method="bash", replace_probability=0.5, temperature=2.0, passes=1)
RELEASING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 20_000,
    "stage3_max_live_parameters": 20_000,
    "stage3_max_reuse_distance": 20_000,
}


def write_json(folder: Path, name: str, **edits: Any) -> str:
    """Write a copy of a JSON in `ds_configs` for few ranks, with edits to its `zero_optimization`; return its path."""
    config = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    zero = config["zero_optimization"] | edits
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = 2
    if "nvme_path" in zero.get("offload_param", {}):
        zero["offload_param"] |= {"nvme_path": str(folder), "buffer_size": 1e6}
    path = folder / name
    path.write_text(json.dumps(config | {"zero_optimization": zero}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", FILES)
def test_every_json_has_a_row_in_its_page_and_is_valid_as_it_stands(tmp_path: Path, name: str) -> None:
    rows = (FOLDER.parent / "docs" / "deepspeed.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in rows if row.startswith(f"| `{name}` |")]
    problems = deepspeed_json.problems(runs.recipe(tmp_path), ds_config.read(str(FOLDER / name)), 8)
    places = [p for p in problems if "nvme_path: expected a folder, got '/local_nvme'" in p or "needs libaio" in p]
    if name in NOT_ON_CPU:  # the last kind of check, which runs if the others find nothing
        assert NOT_ON_CPU[name] in problems.pop()
    assert problems == (places if name == "zero3_infinity.json" else [])


def compiled_here(op: str) -> bool:
    """Return whether an op of DeepSpeed is compiled for this environment; an op of another one is compiled anew."""
    folder = Path(_get_build_directory(op, False))
    return (folder / f"{op}.so").exists() and torch.__path__[0] in (folder / "build.ninja").read_text()


@matrix("name", ["zero2.json", "zero3.json", "zero3_released.json"])
def test_jsons_without_a_feature_of_their_own_take_the_steps_of_the_tests_json(
    two_ranks: Ranks, tmp_path: Path, name: str
) -> None:
    """Most other tests train with `zero3_cpu.json`, and save, resume, and export with it."""
    runs.write_rows(tmp_path)
    model = ModelConfig(name_or_path=runs.write_model(tmp_path), dtype="float32")
    settings = runs.recipe(tmp_path, model=model)
    expected = two_ranks.run(runs.losses_parameters_contexts, settings, 3)
    other = replace(settings, output_dir=settings.output_dir + "-other", deepspeed=write_json(tmp_path, name))
    for plain, result in zip(expected, two_ranks.run(runs.losses_parameters_contexts, other, 3), strict=True):
        assert result[0] == pytest.approx(plain[0], rel=1e-5)
        assert result[2] == plain[2]


# One JSON for each way to keep state that a checkpoint must bring back: node-local shards, an optimizer on the host,
# parameters on disk.
@pytest.mark.parametrize("name", ["zero3_hpz.json", "zero3_offload.json", "zero3_infinity.json"])
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_json_that_keeps_state_elsewhere_trains_saves_resumes_and_exports(
    two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path, name: str
) -> None:
    if "infinity" in name and not compiled_here("async_io"):
        pytest.skip("DeepSpeed's asynchronous I/O is not compiled: `make async-io` (4 minutes)")
    ranks = four_ranks if "hpz" in name else two_ranks
    runs.write_rows(tmp_path)
    settings = runs.recipe(tmp_path, deepspeed=write_json(tmp_path, name), checkpoint=CheckpointConfig(every=2))
    settings.optim.schedule = "constant"  # does not depend on the number of steps
    if "infinity" in name:
        settings.model.preset = WIDE  # no shard below 1 MB goes to disk
    ranks.run(runs.run_training, settings, timeout=400.0)  # an op may be compiled
    assert len(list(tmp_path.glob("zero_stage_3/*/rank0/*.swp"))) == (6 if "infinity" in name else 0)
    stopped = replace(settings, output_dir=settings.output_dir + "-stopped", train=replace(settings.train, max_steps=2))
    ranks.run(runs.run_training, stopped)
    resumed = replace(stopped, resume="auto", train=settings.train)
    ranks.run(runs.run_training, resumed)
    whole, parts = runs.metrics(settings), runs.metrics(resumed)
    assert all(step["passes"] == 1 and not step["dropped"] for step in whole)
    assert whole[3]["loss"] < 0.95 * whole[0]["loss"]
    # DeepSpeed's CPUAdam multiplies up the powers of beta step by step, but after a resume computes them by pow().
    rounding = 1e-5 if name in ON_HOST else 0.0
    assert [step["loss"] for step in parts] == pytest.approx([step["loss"] for step in whole], rel=rounding, abs=0)
    checkpoint = Path(resumed.output_dir) / "checkpoints" / "step-000004"
    export_checkpoint(checkpoint, tmp_path / "exported")
    torch.testing.assert_close(
        load_file(tmp_path / "exported" / "model.safetensors"),
        load_file(Path(resumed.output_dir) / "model" / "model.safetensors"),
        rtol=0,
        atol=0,
    )


def same_as_zero3(ranks: Ranks, folder: Path, name: str, selfgen: SelfgenConfig, **edits: Any) -> None:
    """Check that a JSON gives the losses, weights, and drawn contexts of `zero3.json` to the last bit."""
    runs.write_rows(folder)
    found = []
    for config in ("zero3.json", name):
        settings = runs.recipe(folder, deepspeed=write_json(folder, config, **edits), selfgen=selfgen)
        found.append(ranks.run(runs.losses_parameters_contexts, settings, 4))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other[0], plain[0], rtol=0, atol=0)
        torch.testing.assert_close(other[1], plain[1], rtol=0, atol=0)
        assert other[2] == plain[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_optimizer_on_the_host_takes_the_same_steps_up_to_rounding(two_ranks: Ranks, tmp_path: Path) -> None:
    runs.write_rows(tmp_path)
    found = []
    for name in ("zero3.json", "zero3_offload.json"):
        settings = runs.recipe(tmp_path, deepspeed=write_json(tmp_path, name))
        found.append(two_ranks.run(runs.losses_parameters_contexts, settings, 4, timeout=400.0)[0][0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("edits", [{}, RELEASING], ids=["gathered", "released"])
def test_shards_of_a_node_are_never_those_of_an_older_step(
    four_ranks: Ranks, tmp_path: Path, edits: dict[str, Any]
) -> None:
    same_as_zero3(four_ranks, tmp_path, "zero3_hpz.json", replace(runs.MIXING, passes=2), **edits)


@pytest.mark.slow
def test_rounds_draw_from_shards_of_a_node_what_they_draw_from_plain_ones(four_ranks: Ranks, tmp_path: Path) -> None:
    runs.write_rows(tmp_path)
    found = []
    for name in ("zero3.json", "zero3_hpz.json"):
        settings = runs.recipe(tmp_path, deepspeed=write_json(tmp_path, name, **RELEASING), selfgen=BASH)
        settings.train.max_steps = 6  # a step takes 16 rows, and a round has 40
        four_ranks.run(runs.run_training, settings)
        found.append([(step["round"], step["loss"], step["differing_share"]) for step in runs.metrics(settings)])
    assert found[0] == found[1]
    assert found[0][-1][0] == 3


def gathered_elements(settings: Recipe) -> dict[int, int]:
    """Count the elements gathered in two steps after the first, by the number of ranks that they come from."""
    run = prepare(settings, set())
    runs.steps(run, 1)
    with counted_gathers() as counts:
        runs.steps(run, 2)
    return dict(counts)


@contextmanager
def counted_gathers() -> Iterator[Counter[int]]:
    """Count the elements of all-gathers inside, by the number of ranks in their group."""
    backend = deepspeed.comm.comm.cdb
    gather, counts = backend.all_gather_into_tensor, Counter[int]()

    def counted(output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        counts[dist.get_world_size(group)] += output_tensor.numel()
        return gather(output_tensor, input_tensor, group=group, async_op=async_op)

    backend.all_gather_into_tensor = counted
    try:
        yield counts
    finally:
        backend.all_gather_into_tensor = gather


@pytest.mark.slow
def test_with_shards_of_a_node_the_pass_gathers_nothing_more_between_nodes(four_ranks: Ranks, tmp_path: Path) -> None:
    runs.write_rows(tmp_path)
    found = {}
    for name in ("zero3.json", "zero3_hpz.json"):
        for selfgen in (runs.SFT, runs.MIXING):
            path = write_json(tmp_path, name, **RELEASING)
            settings = runs.recipe(tmp_path, deepspeed=path, selfgen=selfgen)
            settings.train.gradient_accumulation_steps = 1
            found[name, selfgen.method] = four_ranks.run(gathered_elements, settings)[0]
    sft, mixing = found["zero3_hpz.json", "sft"], found["zero3_hpz.json", "scheduled_sampling"]
    assert mixing[4] == sft[4] > 0
    assert mixing[2] > sft[2] > 0
    # Without node-local shards, the same elements are gathered from all ranks.
    assert found["zero3.json", "sft"] == {4: sum(sft.values())}
    assert found["zero3.json", "scheduled_sampling"] == {4: sum(mixing.values())}


def offloaded_bytes(settings: Recipe) -> tuple[int, int]:
    """Return the bytes that a training step moves to host memory, and the size of all layers' inputs in bytes."""
    seen: list[int] = []

    class Counted(save_on_cpu):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.pack = self.pack_hook
            self.pack_hook = self.count

        def count(self, tensor: Tensor) -> Any:
            seen.append(tensor.nbytes)
            return self.pack(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "save_on_cpu", Counted)
        run = prepare(settings, set())
        seen.clear()
        batches = run.method.contexts(run.step_batches.at(0), run.policy, 0)
        assert not seen, "a pass saves nothing"
        train_step(run.engine, batches, 0.0)
    tokens = sum(batch.context_ids[:, :-1].numel() for batch in batches)
    return sum(seen), tokens * runs.PRESET["hidden_size"] * 4 * runs.PRESET["num_hidden_layers"]


@pytest.mark.slow
def test_cpu_checkpointing_moves_every_layers_input_and_changes_no_bit(two_ranks: Ranks, tmp_path: Path) -> None:
    same_as_zero3(two_ranks, tmp_path, "zero3_long.json", runs.MIXING, **RELEASING)
    settings = runs.recipe(tmp_path, deepspeed=write_json(tmp_path, "zero3_long.json"))
    for moved, expected in two_ranks.run(offloaded_bytes, settings):
        assert moved == expected > 0


def training_budget(settings: Recipe) -> int:
    budget = prepare(settings, set()).policy.budget
    assert budget is not None
    return budget.training


def test_a_pass_does_not_count_on_the_memory_of_inputs_that_are_in_host_memory(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    runs.write_rows(tmp_path)
    plain, offloaded = (
        two_ranks.run(training_budget, runs.recipe(tmp_path, deepspeed=write_json(tmp_path, name)))[0]
        for name in ("zero3.json", "zero3_long.json")
    )
    assert plain - offloaded == runs.PRESET["num_hidden_layers"] * runs.PRESET["hidden_size"]


def kept_after_a_pass(settings: Recipe) -> tuple[int, int]:
    """Count the elements gathered in a training step alone, and in a pass and a training step."""
    run = prepare(settings, set())
    runs.steps(run, 2)
    counts = []
    for drawing in (False, True):
        batches = run.step_batches.at(2)
        with counted_gathers() as gathered:
            train_step(run.engine, run.method.contexts(batches, run.policy, 2) if drawing else batches, 0.0)
        counts.append(sum(gathered.values()))
    return counts[0], counts[1]


def test_where_the_training_step_holds_all_weights_anyway_a_pass_gathers_nothing_more(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    runs.write_rows(tmp_path)
    settings = runs.recipe(tmp_path, deepspeed=write_json(tmp_path, "zero3.json"), selfgen=runs.MIXING)
    for plain, behind_a_pass in two_ranks.run(kept_after_a_pass, settings):
        assert plain == behind_a_pass > 0
