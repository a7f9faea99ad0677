"""`bench` on a small model: its counts are exact, whatever other load the machine has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfgen_ds.config import (
    DataConfig,
    ModelConfig,
    Recipe,
    SelfgenConfig,
    TrainConfig,
)
from selfgen_ds.scaling import bench, drawing, losses, steps
from tests.distributed import runs
from tests.ranks import Ranks

LENGTH = 48
BLOCKS = [
    steps.Block(accumulation=1, checkpointing=True, mixtures=((0.0, 1), (0.25, 1), (0.25, 2), (0.5, "exact"))),
    steps.Block(accumulation=2, checkpointing=True, mixtures=((0.25, 1),)),
    steps.Block(accumulation=1, checkpointing=False, mixtures=((0.25, 1),)),
]


def measure(settings: Recipe) -> None:
    """Run the full grid with fewer and smaller blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "FULL", BLOCKS)
        patch.setattr(losses, "TOKENS", 2048)
        patch.setattr(losses, "VOCABULARY", 2000)
        patch.setattr(drawing, "_ROWS", 4)
        patch.setattr(drawing, "_TURNS", 1)
        bench.bench(settings, set(), "full", 2)


@pytest.fixture(scope="module")
def record(two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    wide = runs.PRESET | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": 600}
    settings = runs.recipe(
        folder,
        deepspeed=runs.write_limited_json(folder),
        model=ModelConfig(preset=wide, tokenizer="byte", dtype="float32"),
        data=DataConfig(train="builtin:pointer_chase", max_length=LENGTH),
        selfgen=SelfgenConfig(temperature=2.0),
        train=TrainConfig(max_steps=1, micro_batch_size=2),
    )
    two_ranks.run(measure, settings, timeout=240.0)
    assert (Path(settings.output_dir) / "bench.png").stat().st_size > 5000
    return json.loads((Path(settings.output_dir) / "bench.json").read_text())


def name(row: dict[str, Any]) -> str:
    return row["variant"] if row["variant"] == "sft" else f"p {row['replace_probability']}, {row['passes']}"


def rows(record: dict[str, Any], accumulation: int = 1, checkpointing: bool = True) -> dict[str, dict[str, Any]]:
    return {
        name(row): row
        for row in record["rows"]
        if (row["gradient_accumulation_steps"], row["activation_checkpointing"]) == (accumulation, checkpointing)
    }


@pytest.mark.slow
def test_every_variant_of_every_block_has_a_row_and_sft_is_1(record: dict[str, Any]) -> None:
    assert list(rows(record)) == ["sft", "p 0.0, 1", "p 0.25, 1", "p 0.25, 2", "p 0.5, exact"]
    assert list(rows(record, accumulation=2)) == list(rows(record, checkpointing=False)) == ["sft", "p 0.25, 1"]
    for row in record["rows"]:
        if row["variant"] == "sft":
            ones = row["step_time_ratio"], row["peak_memory_ratio"]
            assert (*ones, row["passes"], row["passes_made"], row["groups"]) == (1, 1, 0, 0, 0)
        assert (row["phases_s"]["pass"][1] > 0.05 * row["step_time_s"]) == (row["passes_made"] > 0)


@pytest.mark.slow
def test_a_step_that_draws_nothing_costs_no_pass(record: dict[str, Any]) -> None:
    row, sft = rows(record)["p 0.0, 1"], rows(record)["sft"]
    assert row["passes_made"] == row["groups"] == 0
    assert row["gathers"] == sft["gathers"]


@pytest.mark.slow
def test_the_phases_add_up_to_the_step(record: dict[str, Any]) -> None:
    for row in record["rows"]:
        parts = sum(median for _, median, _ in row["phases_s"].values())
        assert 0.7 * row["step_time_s"] < parts < 1.5 * row["step_time_s"]  # each phase is from its slowest rank
        low, high = row["step_time_s_quartiles"]
        assert low <= row["step_time_s"] <= high


@pytest.mark.slow
def test_a_pass_gathers_the_parameters_once_per_group(record: dict[str, Any]) -> None:
    for accumulation, checkpointing in ((1, True), (2, True), (1, False)):
        variants = rows(record, accumulation, checkpointing)
        for variant, row in variants.items():
            extra = row["gathers"] - variants["sft"]["gathers"]
            assert extra <= 1.02 * row["passes_made"] * row["groups"], variant
            assert (extra > 0.5 * row["passes_made"] * row["groups"]) == (variant not in ("sft", "p 0.0, 1")), variant


@pytest.mark.slow
def test_a_mixture_needs_no_more_memory_than_sft(record: dict[str, Any]) -> None:
    for row in record["rows"]:
        assert row["peak_memory_bytes"] > 1e6
        assert row["peak_memory_ratio"] <= 1.02, name(row)


@pytest.mark.slow
def test_alternating_variants_never_invalidate_the_trace(record: dict[str, Any]) -> None:
    assert [row["trace_invalidations"] for row in record["rows"]] == [0] * len(record["rows"])


@pytest.mark.slow
def test_the_loss_needs_less_memory_than_the_logits_of_all_positions(record: dict[str, Any]) -> None:
    plain, ours = record["losses"]
    logits = 2048 * 2000 * 4
    assert plain["peak_memory_bytes"] > 2 * logits
    assert ours["peak_memory_bytes"] < logits
    assert plain["hidden_size"] == ours["hidden_size"] == 64
    assert (plain["peak_memory_ratio"], plain["time_ratio"]) == (1, 1)


@pytest.mark.slow
def test_every_way_to_draw_a_round_has_rates_and_ratios_to_generate(record: dict[str, Any]) -> None:
    assert [row["draws"] for row in record["drawing"]] == [
        "bash, p 0.25, 1 pass",
        "bash, p 0.25, exact",
        "rac, free-running",
    ]
    for row in record["drawing"]:
        assert row["weights_fit_gathered"]
        assert min(row["tokens_per_second"][kind] for kind in ("gathered", "sharded", "generate")) > 0
        assert row["ratio_to_generate"]["gathered"] > 0
        (drawing,), (training,), (_,), (sft,) = (row["seconds"][k] for k in ("gathered", "training", "sharded", "sft"))
        assert row["drawing_share"] == pytest.approx(drawing / (drawing + training))
        assert row["epoch_time_ratio"] == pytest.approx((drawing + training) / sft)
    one, exact, free = record["drawing"]
    assert one["passes"] == {"gathered": 1, "sharded": 1}
    assert free["passes"] == {"gathered": 0, "sharded": 0}
    assert exact["passes"]["sharded"] >= exact["passes"]["gathered"] > 1


@pytest.mark.slow
def test_the_record_names_the_environment_the_recipe_and_the_json(record: dict[str, Any]) -> None:
    environment = record["environment"]
    assert environment["hardware"]["ranks"] == 2
    assert environment["hardware"]["accelerator"] == "cpu"
    assert set(environment["versions"]) == {"selfgen_ds", "torch", "transformers", "deepspeed"}
    assert set(environment) == {"command", "date", "commit", "hardware", "versions"}
    assert record["recipe"]["data"]["max_length"] == LENGTH
    assert record["deepspeed"]["zero_optimization"]["stage"] == 3
    for row in record["rows"]:
        assert row["mfu"] is None
        assert row["tokens_per_second"] == pytest.approx(
            2 * 2 * LENGTH * row["gradient_accumulation_steps"] / row["step_time_s"]
        )
        assert row["gathered_bytes"] == pytest.approx(row["gathers"] * record["parameter_bytes"])


def test_every_variant_of_a_turn_gets_the_same_rows_and_every_turn_gets_others(one_rank: Ranks) -> None:
    settings = Recipe(
        output_dir="", deepspeed="", data=DataConfig(train="", max_length=12), train=TrainConfig(micro_batch_size=2)
    )
    [[first, again, later]] = one_rank.run(contexts_of_turns, settings)
    assert first == again != later


def contexts_of_turns(settings: Recipe) -> list[list[list[int]]]:
    return [steps.random_batches(settings, 100, turn)[0].context_ids.tolist() for turn in (3, 3, 4)]
