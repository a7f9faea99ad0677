"""Check answers from a ZeRO-3 model in training, with gathered and with sharded weights, and the steps after them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from selfgen_ds import hashing
from selfgen_ds.config import LoraConfig, ModelConfig, Recipe, TrainConfig
from selfgen_ds.model import gathering
from selfgen_ds.model.budget import token_bytes
from selfgen_ds.model.policy import EnginePolicy, Sampling
from selfgen_ds.scaling.steps import count_invalidations
from selfgen_ds.setup.prepare import Run, prepare
from tests.architectures import ARCHITECTURES
from tests.distributed import runs
from tests.ranks import Ranks
from tests.tiers import matrix

ENDS = list(range(60, 75))  # many end tokens, so that rows finish at very different lengths
LONGEST = 140
MODES = matrix("mode", ["sharded", "gathered", "outside"])


@contextmanager
def memory(free: int) -> Iterator[None]:
    """Pretend that `free` bytes of memory are free."""
    reading, gathering.free_bytes = gathering.free_bytes, lambda: free
    try:
        yield
    finally:
        gathering.free_bytes = reading


@contextmanager
def rolling_out(policy: EnginePolicy, mode: str) -> Iterator[None]:
    """Enter `gathered` with memory for gathered or for sharded weights, or stay outside of it."""
    if mode == "outside":
        yield
        return
    with memory(10**12 if mode == "gathered" else 0), policy.gathered(LONGEST):
        assert policy.sharded == (mode == "sharded")
        yield


def keyed(sample_ids: list[int], draw: int) -> Any:
    """Return the noise of (sample, draw, position)."""

    def uniforms(prompts: Tensor, positions: Tensor) -> Tensor:
        return hashing.uniform(hashing.EVALUATION, 11, torch.tensor(sample_ids)[prompts], draw, positions)

    return uniforms


def another(settings: Recipe, name: str) -> Recipe:
    """Return the same recipe with another output folder."""
    return replace(settings, output_dir=f"{settings.output_dir}-{name}")


def prompts_of(count: int) -> list[list[int]]:
    return [[(7 * i + j) % 50 + 1 for j in range(1 + (i * i) % 9)] for i in range(count)]


def saved(folder: Path, name: str = "llama", **changes: Any) -> Recipe:
    """Return the recipe of a run from saved weights, whose predictions are far from uniform."""
    runs.write_rows(folder)
    fields = ARCHITECTURES[name] | {"initializer_range": 0.5, "tie_word_embeddings": "tied" in name} | changes
    model = ModelConfig(name_or_path=runs.write_model_of(folder, fields), dtype="float32")
    return runs.recipe(folder, model=model, deepspeed=runs.write_limited_json(folder))


def weights(run: Run) -> dict[str, Tensor]:
    return {name: runs.whole(parameter) for name, parameter in run.engine.module.named_parameters()}


def greedy(settings: Recipe) -> tuple[dict[str, list[list[int]]], dict[str, Tensor]]:
    """Return the answers in each mode after two steps, and the weights that gave them."""
    run = prepare(settings, set())
    runs.steps(run, 2)
    run.policy.end_tokens = ENDS
    run.policy.rows_at_once = 3
    answers = {}
    for mode in ("gathered", "sharded"):
        with rolling_out(run.policy, mode):
            answers[mode] = run.policy.complete(prompts_of(9)[dist.get_rank() :: 2], 45)
    return answers, weights(run)


@matrix("name", ["llama, tied", "mixtral"])  # a shared parameter, and modules in varying order
def test_greedy_answers_are_those_of_plain_transformers_on_the_same_weights(
    two_ranks: Ranks, tmp_path: Path, name: str
) -> None:
    settings = saved(tmp_path, name)
    ranks = two_ranks.run(greedy, settings)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(settings.model.name_or_path))).eval()
    plain.load_state_dict(ranks[0][1], strict=False)
    plain.tie_weights()
    lengths = set()
    for rank, (answers, _) in enumerate(ranks):
        expected = []
        for prompt in prompts_of(9)[rank::2]:
            output = plain.generate(
                torch.tensor([prompt]), max_new_tokens=45, do_sample=False, eos_token_id=ENDS, pad_token_id=0
            )
            expected.append(output[0, len(prompt) :].tolist())
        lengths |= {len(answer) for answer in expected}
        for mode, answers_in_mode in answers.items():
            assert answers_in_mode == expected, mode
    assert min(lengths) < 32 < max(lengths), "some end in the first segment of generation, some later"


def sampled(settings: Recipe, mode: str, rows: int) -> dict[tuple[int, int], list[int]]:
    """Return two answers to each of this rank's prompts, by (sample, draw); the ranks have 9 prompts together."""
    run = prepare(settings, set())
    run.policy.end_tokens = ENDS
    run.policy.rows_at_once = rows
    numbers = list(range(dist.get_rank(), 9, dist.get_world_size()))
    if rows == 3:
        numbers.reverse()
    prompts = [prompts_of(9)[number] for number in numbers]
    results: dict[tuple[int, int], list[int]] = {}
    with rolling_out(run.policy, mode):
        for draw in (0, 1):
            answers = run.policy.complete(prompts, 40, keyed(numbers, draw), Sampling(temperature=1.5, top_p=0.9))
            results |= {(number, draw): answer for number, answer in zip(numbers, answers, strict=True)}
    return results


@pytest.mark.slow
def test_sampled_answers_do_not_depend_on_ranks_batches_order_or_sharding(
    two_ranks: Ranks, one_rank: Ranks, tmp_path: Path
) -> None:
    settings = saved(tmp_path)
    expected = one_rank.run(sampled, settings, "outside", 64)[0]
    assert len(expected) == 18
    for mode, rows in (("gathered", 64), ("gathered", 3), ("sharded", 3)):
        first, second = two_ranks.run(sampled, another(settings, f"{mode}-{rows}"), mode, rows)
        assert first | second == expected, (mode, rows)
    assert all(expected[i, 0] != expected[i, 1] for i in range(9))


def uneven(settings: Recipe, mode: str) -> tuple[list[int], list[int], int]:
    """Generate with prompts on rank 1 only, then without prompts on either rank, and run a training step."""
    run = prepare(settings, set())
    run.policy.end_tokens = ENDS
    run.policy.rows_at_once = 2
    prompts = [] if dist.get_rank() == 0 else [*prompts_of(5), [5] * 60]
    with rolling_out(run.policy, mode):
        answers = run.policy.complete(prompts, 70)
        sampled = run.policy.complete(prompts, 70, keyed(list(range(len(prompts))), 0))
        assert run.policy.complete([], 5) == []
    [result] = runs.steps(run, 1)[0]
    return [len(a) for a in answers], [len(a) for a in sampled], int(result.applied)


@MODES
def test_a_rank_without_prompts_keeps_step_with_one_that_has_the_longest(
    two_ranks: Ranks, tmp_path: Path, mode: str
) -> None:
    nothing, much = two_ranks.run(uneven, saved(tmp_path), mode, timeout=60.0)
    assert nothing == ([], [], 1)
    assert len(much[0]) == len(much[1]) == 6


def choices(settings: Recipe) -> tuple[list[tuple[bool, int, bool]], list[str]]:
    """Return the choices at growing sizes of free memory, and the lines logged.

    A choice is: whether weights stay sharded, the rows at once, and whether ZeRO-3's hooks are on.
    """
    run = prepare(settings, set())
    policy, hook = run.policy, run.engine.optimizer.parameter_offload.forward_hooks[0]
    policy.end_tokens = [len(run.tokenizer)]  # no token has this id
    weights = sum(p.ds_numel * 4 for p in policy.model.parameters())
    row = policy._row_bytes(100)
    seen = []
    with logged() as lines:
        for free in (weights // 2, weights // 2, weights + row // 2, weights + row * 3.5, 10**12):
            less = 0 if dist.get_rank() == 0 else row
            with memory(int(free / 0.9) - less + 1), policy.gathered(100):
                seen.append((policy.sharded, policy.rows_at_once, hook.id in hook.hooks_dict_ref()))
                policy.complete([[1], [2]], 5)
                assert not policy.model.training, "one of several in a row ends its own mode"
                with memory(0), policy.gathered(10):
                    assert (policy.sharded, policy.rows_at_once) == seen[-1][:2], "an inner one changes nothing"
                assert (policy.sharded, policy.rows_at_once) == seen[-1][:2]
            assert (policy.sharded, policy.rows_at_once) == (True, 64)
    return seen, lines


def test_weights_are_gathered_where_they_and_a_row_fit_on_every_rank_and_the_choice_is_logged_once(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    (first, lines), (second, _) = two_ranks.run(choices, saved(tmp_path))
    assert first == second
    little, same, no_row, some_rows, plenty = first
    assert little == same
    assert little[::2] == no_row[::2] == (True, True)
    assert some_rows == (False, 2, False)
    assert plenty == (False, 64, False)
    sharded, rate, gathered, other_rate = lines
    assert "stay sharded" in sharded
    assert "are gathered once; 2 rows at once" in gathered
    assert rate.startswith("generation: this rank generated 10 tokens in")
    assert other_rate.startswith("generation: this rank generated 10 tokens in")


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect the lines logged at level INFO and above."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, log = Collect(), logging.getLogger("selfgen_ds")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def interrupted(settings: Recipe, mode: str) -> tuple[list[float], dict[str, Tensor], int, bool]:
    """Run steps with rollouts between them, one of which ends in an error.

    Returns:
        Losses, weights, the number of invalidated traces, and whether the model is in training mode.
    """
    run = prepare(settings, set())
    run.policy.end_tokens = ENDS
    losses = [r.loss for r in runs.steps(run, 2)[0]]
    seen = count_invalidations(run.engine)
    for error in () if mode == "none" else (False, True, False):
        with pytest.raises(KeyError) if error else nullcontext(), rolling_out(run.policy, mode):
            run.policy.complete(prompts_of(4 + dist.get_rank()), 40, keyed(list(range(9)), 0))
            if error:
                raise KeyError
        assert run.engine.module.training
        assert run.policy.sharded
        losses += [r.loss for r in runs.steps(run, 2)[0]]
    if mode == "none":
        losses += [r.loss for _ in range(3) for r in runs.steps(run, 2)[0]]
    assert run.engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    return losses, weights(run), len(seen), run.engine.module.training


@matrix("kind", ["dropout", "mixtral", "lora"])
def test_training_with_rollouts_between_even_ones_that_fail_is_training_without_to_the_last_bit(
    two_ranks: Ranks, tmp_path: Path, kind: str
) -> None:
    settings = saved(tmp_path, "mixtral" if kind == "mixtral" else "llama", attention_dropout=0.1)
    settings.optim.learning_rate = 1e-3
    settings.train = TrainConfig(max_steps=20, micro_batch_size=2, gradient_accumulation_steps=2)
    if kind == "dropout":
        settings.deepspeed = runs.write_limited_json(tmp_path, persistent=100)
    if kind == "lora":
        settings.model.lora = LoraConfig(r=2, lora_dropout=0.1)
    expected = two_ranks.run(interrupted, settings, "none")
    assert len(set(expected[0][0])) > 2
    for mode in ("gathered",) if kind == "lora" else ("gathered", "sharded"):
        for rank, (losses, parameters, thrown_away, training) in enumerate(
            two_ranks.run(interrupted, another(settings, mode), mode)
        ):
            assert losses == expected[rank][0], mode
            assert thrown_away == 0
            assert training
            assert all(torch.equal(parameters[name], value) for name, value in expected[rank][1].items())


def inside_and_outside(settings: Recipe) -> tuple[bool, list[int]]:
    """Draw and predict a step's batches with sharded weights, and with gathered ones in two sizes of memory.

    First there is memory for everything, then on rank 1 for one row only. Return whether all results are equal, and
    the forwards with gathered weights in both cases.
    """
    run = prepare(settings, set())
    runs.steps(run, 2)
    batches = run.step_batches.at(2)
    forwards: list[None] = []
    run.policy.model.model.register_forward_pre_hook(lambda *_: forwards.append(None))

    def drawn() -> list[Tensor]:
        contexts = [batch.context_ids for batch in run.method.contexts(batches, run.policy, 2)]
        return [*contexts, *run.policy.predict(batches[0])]

    before = drawn()
    equal = True
    counts = []
    for spare in (run.policy._spare_bytes, token_bytes(run.policy.model.config, 4) if dist.get_rank() else 10**12):
        with rolling_out(run.policy, "gathered"):
            run.policy._spare_bytes = spare
            forwards.clear()
            equal &= all(torch.equal(one, other) for one, other in zip(before, drawn(), strict=True))
            counts.append(len(forwards))
    return equal, counts


def test_draws_and_predictions_on_gathered_weights_are_the_sharded_ones_and_keep_to_the_memory_that_is_left(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    roomy, narrow = two_ranks.run(inside_and_outside, saved(tmp_path))
    assert roomy[0]
    assert roomy[1][0] == roomy[1][1]
    assert narrow[0]
    assert narrow[1][0] == roomy[1][0]
    assert narrow[1][1] > roomy[1][1]  # one forward per row, while rank 0 runs fewer


def hooks(module: torch.nn.Module) -> dict[str, list[int]]:
    """Return the ids of every module's hooks in their order."""
    return {
        f"{name}.{kind}": list(table)
        for name, part in module.named_modules()
        for kind, table in vars(part).items()
        if kind.endswith("_hooks") and isinstance(table, dict) and table
    }


def hooks_before_inside_and_after(settings: Recipe) -> tuple[set[int], list[dict[str, list[int]]]]:
    """Return ZeRO-3's hooks, and all hooks before, inside, and after `gathered`, with a user's hooks among them."""
    run = prepare(settings, set())
    offload, layer = run.engine.optimizer.parameter_offload, run.engine.module.model.layers[0]
    layer.register_forward_pre_hook(lambda *_: None)
    layer.register_forward_hook(lambda *_: None)
    seen = [hooks(run.engine.module)]
    with rolling_out(run.policy, "gathered"):
        seen.append(hooks(run.engine.module))
    seen.append(hooks(run.engine.module))
    return {h.id for h in (offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks)}, seen


def test_on_gathered_weights_zero3s_hooks_are_away_and_return_to_their_places(one_rank: Ranks, tmp_path: Path) -> None:
    [(zero3, (before, inside, after))] = one_rank.run(hooks_before_inside_and_after, saved(tmp_path))
    all_hooks = {hook for table in before.values() for hook in table}
    assert len(zero3) > 20
    assert {hook for table in inside.values() for hook in table} == all_hooks - zero3
    assert after == before


def gathers(settings: Recipe) -> dict[str, int]:
    """Count the all-gathers of weights while 20 tokens are generated, by mode."""
    run = prepare(settings, set())
    counts = {}
    for mode in ("gathered", "sharded"):
        with rolling_out(run.policy, mode):
            calls = 0

            def counted(gather: Any) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    return gather(*args, **kwargs)

                return call

            originals = {p: p.all_gather_coalesced for p in run.policy.model.parameters()}
            for p, gather in originals.items():
                p.all_gather_coalesced = counted(gather)
            run.policy.complete(prompts_of(2), 20)
            for p, gather in originals.items():
                p.all_gather_coalesced = gather
            counts[mode] = calls
    return counts


def test_answers_on_gathered_weights_gather_nothing(two_ranks: Ranks, tmp_path: Path) -> None:
    for counts in two_ranks.run(gathers, saved(tmp_path)):
        assert counts["gathered"] == 0
        assert counts["sharded"] > 20
