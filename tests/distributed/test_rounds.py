"""BASH and RAC on real ranks: what they draw, for any model, on any number of ranks, with any memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file

from selfgen_ds.checkpoint import export
from selfgen_ds.config import DataConfig, EvalConfig, ModelConfig, Recipe, SelfgenConfig, Source, TrainConfig
from selfgen_ds.data.samples import end_tokens, first_rows
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.engine.step import train_step
from selfgen_ds.model import checksum, gathering
from selfgen_ds.model.checksum import weights_checksum
from selfgen_ds.model.loading import build_model, model_config
from selfgen_ds.model.policy import EnginePolicy, Sampling
from selfgen_ds.scaling.memory import LiveTensors
from selfgen_ds.scaling.steps import count_invalidations
from selfgen_ds.setup.inputs import load_data, load_method, load_step_batches
from selfgen_ds.setup.prepare import prepare
from tests.architectures import ARCHITECTURES
from tests.distributed import runs
from tests.distributed.round_runs import DROPOUT, METHODS, TIMEOUT, audit, drawn, rounds
from tests.distributed.test_lora import adapting, with_stage
from tests.ranks import Ranks
from tests.tiers import matrix

# --- nothing drawn is sft ---


@matrix("order", ["packing", "group_by_length"])
def test_bash_of_probability_zero_and_rac_without_corrections_are_sft_bit_for_bit(
    two_ranks: Ranks, folder: Path, order: str
) -> None:
    """The runs read two weighted sources in at least three rounds, which need not start with a step's first row."""
    more = [{"prompt": f"other {i}: ", "completion": "row " * (i + 1)} for i in range(7)]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    bash = SelfgenConfig(method="bash", replace_probability=0.0)
    selfgen = {"sft": runs.SFT, "bash": bash}
    if order == "packing":  # settings that keep every drawn token away are the same thing
        mixing = replace(bash, replace_probability=0.7)
        selfgen["clean"] = replace(mixing, clean_share=1.0)
        selfgen["no differing token"] = replace(mixing, max_differing_tokens=0)
        selfgen["ended"] = replace(mixing, final_share=1.0)
    if order != "packing":
        selfgen["rac"] = SelfgenConfig(method="rac", cue="", sft_share=1.0)
    found = {}
    for name, its in selfgen.items():
        sources = [Source(path=str(folder / f), weight=w) for f, w in (("rows.jsonl", 2.0), ("more.jsonl", 1.0))]
        data = DataConfig(
            train=[*sources], max_length=128, packing=order == "packing", group_by_length=order == "group_by_length"
        )
        rows_at_once = 1 if order == "packing" else 2
        train = TrainConfig(epochs=2.3, micro_batch_size=rows_at_once, gradient_accumulation_steps=2)
        settings = runs.recipe(folder, selfgen=its, data=data, train=train, eval=EvalConfig(max_samples=4))
        settings.data.eval = str(folder / "more.jsonl")
        settings.model.preset = runs.PRESET | DROPOUT
        two_ranks.run(runs.run_training, settings, timeout=TIMEOUT)
        aside = {"replace_probability", "round", "round_differing_share"}
        if its.max_differing_tokens == 0:  # equal tokens are drawn
            aside |= {"drawn_tokens", "passes", "groups", "no_grad_tokens", "flops"}
            assert runs.metrics(settings)[0]["no_grad_tokens"] > 0
        rows = [{k: v for k, v in row.items() if k not in aside} for row in runs.untimed(settings)]
        found[name] = (rows, runs.weights(settings))
        assert rows[-1]["epoch"] == pytest.approx(2.3, abs=0.2)
        assert rows[-1]["eval_loss"] > 0
        assert name == "sft" or len(rounds(settings)) >= 3
    for name, (rows, its_weights) in found.items():
        plain = [{k: v for k, v in s.items() if k in row} for s, row in zip(found["sft"][0], rows, strict=True)]
        assert rows == plain, name
        assert its_weights == found["sft"][1], name


# --- what does not change what is drawn ---


def first_round(settings: Recipe, free: int) -> tuple[str, set[bool]]:
    """Draw a round; return the checksum of the weights, and whether they were sharded meanwhile."""
    seen = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "free_bytes", lambda: free)
        run = prepare(settings, set())
        method = run.method.as_round_method()
        assert method is not None
        assert run.rounds is not None
        rows = method.rows

        def watched(*arguments: Any) -> Any:
            seen.add(run.policy.sharded)
            return rows(*arguments)

        patch.setattr(method, "rows", watched)
        run.rounds.step_batches(0)
    return weights_checksum(run.engine), seen


MUCH, LITTLE = 1 << 40, 1


@pytest.mark.slow
def test_the_same_is_drawn_on_any_number_of_ranks_at_any_stage_gathered_or_sharded(
    two_ranks: Ranks, one_rank: Ranks, folder: Path
) -> None:
    model = ModelConfig(name_or_path=runs.write_model(folder, initializer_range=0.5), dtype="float32")
    checksums = set()
    for name, selfgen in METHODS.items():
        found = {}
        for ranks, stage, free in [
            (two_ranks, 3, MUCH),
            (two_ranks, 3, LITTLE),
            (one_rank, 3, MUCH),
            (two_ranks, 0, MUCH),
            (two_ranks, 2, MUCH),
        ]:
            settings = runs.recipe(folder, model=model, selfgen=selfgen, deepspeed=with_stage(folder, stage))
            settings.train.micro_batch_size = settings.train.shape(1).micro_batch_size * 2 // ranks.world_size
            for its_checksum, sharded in ranks.run(first_round, settings, free, timeout=TIMEOUT):
                checksums.add(its_checksum)
                assert sharded == {stage == 3 and free == LITTLE}
            found[ranks.world_size, stage, free] = drawn(settings, "round-01")
        expected = found[2, 3, MUCH]
        assert sum(any(row["replaced_mask"]) for row in expected) > 10
        for case, rows in found.items():
            assert rows == expected, (name, case)
    assert len(checksums) == 1


def checksums(settings: Recipe) -> None:
    """Check that the checksum differs for any two models, and is the same after a resume."""
    run = prepare(settings, set())
    before = weights_checksum(run.engine)
    seen = {before}
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda flat: torch.cat([torch.nextafter(flat[:1], flat[:1] + 1), flat[1:]]),
        lambda flat: torch.cat([flat[:-1], -flat[-1:]]),
        lambda flat: torch.cat([flat[1:2], flat[:1], flat[2:]]),
    ]
    parameters = list(run.engine.module.parameters())
    matrices = [p for p in parameters if len(p.ds_shape) > 1]
    for parameter in (matrices[0], matrices[1], matrices[-1]):
        for change in changes:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                kept = parameter.data.clone()
                parameter.data.copy_(change(parameter.data.flatten()).view_as(parameter))
            seen.add(weights_checksum(run.engine))
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(kept)
    same = [p for p in parameters if p.ds_shape == parameters[1].ds_shape][:2]
    for _ in range(2):  # exchange two matrices, and exchange them again
        with deepspeed.zero.GatheredParameters(same, modifier_rank=0):
            one, other = (p.data.clone() for p in same)
            same[0].data.copy_(other)
            same[1].data.copy_(one)
        seen.add(weights_checksum(run.engine))
    assert len(seen) == 1 + 3 * len(changes) + 1
    assert weights_checksum(run.engine) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksum, "_PIECE", 999)
        assert weights_checksum(run.engine) == before
    runs.steps(run, 1)
    trained = weights_checksum(run.engine)
    assert trained not in seen
    runs.save(run, settings, 1)
    again = prepare(replace(settings, resume="auto"), set())
    assert again.folder.first_step == 1
    assert weights_checksum(again.engine) == trained


def test_a_checksum_of_weights_changes_with_any_of_them_and_outlasts_a_resume(two_ranks: Ranks, folder: Path) -> None:
    two_ranks.run(checksums, runs.recipe(folder), timeout=TIMEOUT)


# --- little to draw ---


def train_with(settings: Recipe, free: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "free_bytes", lambda: free)
        runs.run_training(settings)


def write_model_that_says_nothing(folder: Path) -> Path:
    """Save a model whose hidden state is the same everywhere, so that the end token is always the most probable."""
    path = Path(runs.write_model(folder))
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("embed_tokens.weight", "norm.weight")):
            tensor.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.fill_(0.0)
    tensors["lm_head.weight"][byte_tokenizer().eos_token_id] = 10.0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path.rename(folder / "base")


@matrix(("count", "free"), [(1, LITTLE), (3, MUCH)])
@matrix("method", METHODS)
def test_fewer_chunks_than_ranks_and_empty_answers_are_trained_on(
    two_ranks: Ranks, tmp_path: Path, method: str, count: int, free: int
) -> None:
    runs.write_rows(tmp_path, count)
    train = TrainConfig(max_steps=4, micro_batch_size=1, gradient_accumulation_steps=1)  # 2 rows per step
    selfgen = replace(METHODS[method], epochs_per_round=2)
    settings = runs.recipe(tmp_path, train=train, selfgen=selfgen)
    empty = method == "rac" and count == 3
    if empty:
        settings.model = ModelConfig(name_or_path=str(write_model_that_says_nothing(tmp_path)), dtype="float32")
        settings.selfgen.sft_share = 0.0
    two_ranks.run(train_with, settings, free, timeout=TIMEOUT)
    assert rounds(settings) == [f"round-{n:02d}" for n in range(1, 1 + (4 if count == 1 else 2))]
    rows = drawn(settings, "round-01")
    assert [row["sample_id"] for row in rows] == list(range(count))
    assert all(row["loss"] > 0 for row in runs.metrics(settings))
    if empty:
        assert audit(settings, "round-01")["counts"]["answers"] == 3
        assert not any(any(row["replaced_mask"]) for row in rows)
        texts = [byte_tokenizer().decode(row["context_ids"]) for row in rows]
        assert [text.split(":")[1] for text in texts] == [" \nCorrected answer"] * 3


# --- kinds of models ---


def agreement(settings: Recipe, model: Path, rows: list[dict[str, Any]], number: int) -> float:
    """Return the share of a round's rows that the model draws in this process as well."""
    source = ModelConfig(name_or_path=str(model), dtype="float32")
    tokenizer = byte_tokenizer()
    plain = build_model(source, model_config(source, tokenizer))
    samples = load_data(settings, tokenizer)
    shape = {"step_size": 8, "micro_batch_size": 2, "rank": 0, "world_size": 2, "epochs": None}
    step_batches = load_step_batches(settings, samples, **shape)
    method = load_method(settings, tokenizer, samples, step_batches, 6).as_round_method()
    assert method is not None
    policy = EnginePolicy(plain, end_tokens=end_tokens(samples, tokenizer), sampling=Sampling.of(settings.selfgen))
    own, _ = method.rows(first_rows(samples), policy, number)
    pairs = [(one.context_ids.tolist(), row["context_ids"]) for one, row in zip(own, rows, strict=True)]
    same = [one == other for (one, other), row in zip(pairs, rows, strict=True) if any(row["replaced_mask"])]
    return sum(same) / len(same)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_rounds_are_drawn_from_the_adapted_model(two_ranks: Ranks, folder: Path, method: str) -> None:
    settings = adapting(folder, selfgen=METHODS[method])
    settings.optim.learning_rate, settings.train.max_steps = 0.05, 6
    two_ranks.run(runs.run_training, settings, timeout=TIMEOUT)
    export.export_checkpoint(Path(settings.output_dir) / "checkpoints" / "step-000005", folder / "adapted")
    rows = [drawn(settings, f"round-{n:02d}") for n in (1, 2)]
    # merged weights are rounded in another way
    assert agreement(settings, folder / "base", rows[0], 0) > 0.9
    assert agreement(settings, folder / "adapted", rows[1], 1) > 0.9
    assert agreement(settings, folder / "base", rows[1], 1) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_mixture_of_experts_has_rounds_too(two_ranks: Ranks, folder: Path, method: str) -> None:
    model = ModelConfig(preset=ARCHITECTURES["mixtral"], tokenizer="byte", dtype="float32")
    settings = runs.recipe(folder, model=model, selfgen=METHODS[method])
    settings.train.max_steps = 6
    two_ranks.run(runs.run_training, settings, timeout=TIMEOUT)
    assert rounds(settings) == ["round-01", "round-02"]
    assert all(row["router_loss"] > 0 for row in runs.metrics(settings))


@matrix("free", [LITTLE, MUCH])
def test_answers_end_where_the_models_positions_do(two_ranks: Ranks, tmp_path: Path, free: int) -> None:
    """The longest prompt and the longest answer do not fit into the positions together."""
    rows = [{"prompt": "p" * prompt, "completion": "a" * answer} for prompt, answer in ((40, 2), (5, 30), (20, 9)) * 2]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preset = ARCHITECTURES["gpt2"] | {"n_positions": 64}
    settings = runs.recipe(tmp_path, model=ModelConfig(preset=preset, tokenizer="byte", dtype="float32"))
    settings.data.max_length, settings.train.max_steps, settings.train.micro_batch_size = 64, 1, 1
    settings.selfgen = SelfgenConfig(method="rac", temperature=2.0, sft_share=0.0)
    two_ranks.run(train_with, settings, free, timeout=TIMEOUT)
    answers = [sum(row["replaced_mask"]) for row in drawn(settings, "round-01")]
    # the room left by prompt, cue of 19 tokens, reference and end token
    assert [max(answers[i::3]) for i in range(3)] == [64 - 40 - 19 - 3, 64 - 5 - 19 - 31, 64 - 20 - 19 - 10]


# --- what drawing costs ---


def invalidations(settings: Recipe, free: int) -> int:
    """Count how often ZeRO-3 discards its trace in a round and at the start of the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "free_bytes", lambda: free)
        run = prepare(settings, set())
        assert run.rounds is not None
        seen = count_invalidations(run.engine)
        for step in range(7):
            train_step(run.engine, run.rounds.step_batches(step).at(step), 0.0)
    assert run.engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    return len(seen)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "free"), [("bash", LITTLE), ("rac", MUCH)])
def test_drawing_a_round_does_not_invalidate_the_trace(two_ranks: Ranks, folder: Path, method: str, free: int) -> None:
    few: dict[str, Any] = {"passes": 1} if method == "bash" else {"max_new_tokens": 3}
    settings = runs.recipe(folder, selfgen=replace(METHODS[method], **few), deepspeed=runs.write_limited_json(folder))
    settings.train.max_steps = 7  # 5 steps per round
    assert two_ranks.run(invalidations, settings, free, timeout=TIMEOUT) == [0, 0]
    assert rounds(settings) == ["round-01", "round-02"]


def drawing_and_step_peaks(settings: Recipe) -> tuple[int, int, int]:
    """Return the peaks of drawing a round and of a training step, and the bytes of the weights."""
    run = prepare(settings, set())
    assert run.rounds is not None
    batches = run.step_batches.at(0)
    train_step(run.engine, batches, 0.0)  # optimizer states and gradient buffers exist from here on
    with LiveTensors() as tensors:
        run.rounds.step_batches(0)
    drawing = tensors.peak
    tensors.reset()
    with tensors:
        train_step(run.engine, batches, 0.0)
    return drawing, tensors.peak, sum(4 * p.ds_numel for p in run.engine.module.parameters())


@pytest.mark.slow
def test_drawing_a_round_of_bash_takes_no_more_than_a_training_step_and_the_weights(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "%s"}\n' % ("b" * 62) * 128)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
    settings = runs.recipe(
        tmp_path,
        deepspeed=runs.write_limited_json(tmp_path),
        model=ModelConfig(preset=runs.PRESET | shape, tokenizer="byte", dtype="float32"),
        selfgen=SelfgenConfig(method="bash", replace_probability=0.9, passes=2),
        train=TrainConfig(max_steps=4, micro_batch_size=8, gradient_accumulation_steps=2),
    )
    for drawing, step, parameters in two_ranks.run(drawing_and_step_peaks, settings, timeout=TIMEOUT):
        print(f"drawing {drawing / 1e6:.1f} MB, a step {step / 1e6:.1f} MB, the weights {parameters / 1e6:.1f} MB")
        assert drawing <= step + parameters


def test_own_samples_are_drawn_in_rounds_and_learned(two_ranks: Ranks, folder: Path) -> None:
    own = SelfgenConfig(method="own_samples", max_new_tokens=12)
    settings = runs.recipe(folder, selfgen=own, train=TrainConfig(epochs=2, micro_batch_size=2))
    two_ranks.run(runs.run_training, settings, timeout=TIMEOUT)
    assert len(rounds(settings)) == 2
    for row in drawn(settings, "round-01"):
        assert row["context_ids"] == row["target_ids"]
        assert 1 <= sum(row["loss_mask"]) <= 12
