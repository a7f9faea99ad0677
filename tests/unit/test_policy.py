"""Check the pass, predictions, and answers against plain transformers with full logits, one row at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from selfgen_ds import hashing
from selfgen_ds.config import ModelConfig
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.methods.mixture import mix, replacement_mask
from selfgen_ds.model import probe
from selfgen_ds.model.budget import SweepBudget, sweep_budget
from selfgen_ds.model.policy import EnginePolicy, Sampling
from selfgen_ds.model.reductions import add_reductions
from tests.architectures import ARCHITECTURES, EVERY_ARCHITECTURE, attention
from tests.batches import lengths, padded
from tests.trained import reference_draw

SEED, STEP, END = 5, 7, 39
NARROW = SweepBudget(forward=1, training=1, prefetched=0)


@pytest.fixture(scope="module")
def plain() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,  # large, so that predictions are far from uniform
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def extended(plain: LlamaForCausalLM) -> PreTrainedModel:
    model = LlamaForCausalLM(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return add_reductions(model)


def micro_batches() -> list[TokenBatch]:
    rng = np.random.default_rng(0)

    def rows(count: int, longest: int) -> list[list[int]]:
        return [rng.integers(0, 39, rng.integers(1, longest)).tolist() for _ in range(count)]

    return [padded(rows(3, 6), rows(3, longest), [10 * m + i for i in range(3)]) for m, longest in enumerate((20, 4))]


@torch.no_grad()
def reference_context(
    model: PreTrainedModel,
    batch: TokenBatch,
    row: int,
    mask: Tensor,
    passes: int,
    s: Sampling,
    seed: int = SEED,
    step: int = STEP,
) -> list[int]:
    """Return the context of one row that passes over the full logits draw."""
    context = batch.target_ids[row, : lengths(batch)[row]].clone()
    for _ in range(passes):
        logits = model(context[None]).logits[0]
        drawn = context.clone()
        for t in mask[row].nonzero().flatten().tolist():
            uniform = hashing.uniform(hashing.DRAW, seed, step, int(batch.sample_ids[row, 0]), t)
            drawn[t] = reference_draw(logits[t - 1], float(uniform), s)
        context = drawn
    return context.tolist()


@pytest.mark.parametrize(
    ("passes", "budget", "sampling"),
    [
        (1, None, Sampling()),
        (3, NARROW, Sampling()),
        (1, NARROW, Sampling(temperature=0.7)),
        (3, None, Sampling(temperature=2.0, top_p=0.8)),
        (3, None, Sampling(top_k=5)),
    ],
)
def test_the_pass_draws_from_the_model_given_the_context_before(
    plain: LlamaForCausalLM, extended: PreTrainedModel, passes: int, budget: SweepBudget | None, sampling: Sampling
) -> None:
    policy = EnginePolicy(extended, end_tokens=[END], sampling=sampling, budget=budget)
    batches = micro_batches()
    masks = [replacement_mask(batch, 0.6, (hashing.REPLACE, SEED, STEP)) for batch in batches]
    mixed, made = mix(batches, policy, masks, passes, (hashing.DRAW, SEED, STEP))
    assert made == passes
    assert policy.groups == (2 if budget and passes == 1 else 1)  # a last pass reads only rows that can still change
    changed = 0
    for batch, mask, result in zip(batches, masks, mixed, strict=True):
        for row, length in enumerate(lengths(batch)):
            expected = reference_context(plain, batch, row, mask, passes, sampling)
            assert result.context_ids[row, :length].tolist() == expected
            changed += expected != batch.target_ids[row, :length].tolist()
    assert changed >= 4


@EVERY_ARCHITECTURE
def test_draws_predictions_and_answers_of_every_architecture_are_plain_transformers(name: str) -> None:
    torch.manual_seed(0)
    fields = ARCHITECTURES[name] | {"vocab_size": 40, "eos_token_id": END, "initializer_range": 0.5}
    config = AutoConfig.for_model(**fields | {"pad_token_id": None, "bos_token_id": None})
    settings = ModelConfig(preset=fields, attn_implementation=attention(name))
    plain = AutoModelForCausalLM.from_config(config, attn_implementation=attention(name)).eval()
    extended = add_reductions(deepcopy(plain), probe.check(settings, config, packing=False).logit_transform)
    policy = EnginePolicy(extended, end_tokens=[END], sampling=Sampling(temperature=1.5))
    batches = micro_batches()
    masks = [replacement_mask(batch, 0.6, (hashing.REPLACE, SEED, STEP)) for batch in batches]
    mixed, _ = mix(batches, policy, masks, 2, (hashing.DRAW, SEED, STEP))
    for batch, mask, result in zip(batches, masks, mixed, strict=True):
        for row, length in enumerate(lengths(batch)):
            expected = reference_context(plain, batch, row, mask, 2, policy.sampling)
            assert result.context_ids[row, :length].tolist() == expected
    assert_predictions_are_those_of(plain, policy)
    for prompt, answer in zip([[1, 2, 3], [4]], policy.complete([[1, 2, 3], [4]], 6), strict=True):
        output = plain.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=END)
        assert answer == output[0, len(prompt) :].tolist()


@contextmanager
def defaults(model: PreTrainedModel, **settings: object) -> Iterator[None]:
    """Give the model other generation defaults inside."""
    before, model.generation_config = model.generation_config, GenerationConfig(**settings)
    yield
    assert model.generation_config.do_sample == settings["do_sample"], "put back"
    model.generation_config = before


def answer_noise(prompts: Tensor, positions: Tensor) -> Tensor:
    return hashing.uniform(hashing.EVALUATION, SEED, prompts, positions)


def test_the_models_own_generation_defaults_are_not_used(extended: PreTrainedModel) -> None:
    policy = EnginePolicy(extended, end_tokens=[END])
    prompts = [[1, 2, 3], [4, 5]]
    greedy = policy.complete(prompts, 12)
    with defaults(extended, do_sample=True, temperature=5.0, repetition_penalty=3.0, min_new_tokens=12):
        assert policy.complete(prompts, 12) == greedy
    sampled = policy.complete(prompts, 12, answer_noise, Sampling(temperature=3.0))
    with defaults(extended, do_sample=True, top_p=1e-6):
        assert policy.complete(prompts, 12, answer_noise, Sampling(temperature=3.0)) == sampled != greedy


def test_an_answer_ends_with_its_end_token(extended: PreTrainedModel) -> None:
    policy = EnginePolicy(extended, end_tokens=[END])
    first = policy.complete([[1, 2, 3]], 6)[0]
    ending = EnginePolicy(extended, end_tokens=[first[2]])
    assert ending.complete([[1, 2, 3], [4, 5]], 6)[0] == first[: first.index(first[2]) + 1]


def assert_predictions_are_those_of(plain: PreTrainedModel, policy: EnginePolicy) -> None:
    [batch, _] = micro_batches()
    best, _, log_probabilities, *_ = policy.predict(batch)
    expected_best, expected = [], []
    with torch.no_grad():
        for row, length in enumerate(lengths(batch)):
            p = plain(batch.target_ids[row : row + 1, :length]).logits[0].log_softmax(dim=-1)
            for t in batch.loss_mask[row].nonzero().flatten().tolist():
                expected_best.append(int(p[t - 1].argmax()))
                expected.append(float(p[t - 1, batch.target_ids[row, t]]))
    assert best.tolist() == expected_best
    assert log_probabilities.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def budget_of(packed_length: int | None = None, attn_implementation: str = "sdpa", **fields: Any) -> SweepBudget:
    sizes = {"hidden_size": 100, "intermediate_size": 400, "num_hidden_layers": 3, "num_attention_heads": 10}
    config = AutoConfig.for_model(**{"model_type": "llama", "num_key_value_heads": 10} | sizes | fields)
    config._attn_implementation = attn_implementation
    return sweep_budget(config, True, 0, packed_length)


def test_the_budget_counts_the_experts_that_a_token_goes_to() -> None:
    dense = budget_of(intermediate_size=800)
    experts: dict[str, Any] = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    two, four = budget_of(**experts), budget_of(**experts | {"num_experts_per_tok": 4})
    assert dense.forward < two.forward < four.forward
    assert dense.training < two.training < four.training
    assert budget_of(**experts | {"num_local_experts": 64}) == two


def test_the_budget_of_a_configuration_without_an_inner_size_is_that_of_four_times_the_hidden_size() -> None:
    fields: dict[str, Any] = {
        "model_type": "gpt2",
        "n_embd": 100,
        "n_layer": 3,
        "n_head": 10,
        "activation_function": "gelu",
    }
    assert budget_of(**fields) == budget_of(**fields | {"n_inner": 400}) == budget_of()


def test_packed_rows_have_a_mask_in_sweep_and_step_but_not_with_flash_attention() -> None:
    plain, packed = budget_of(), budget_of(packed_length=1000)
    assert packed.forward - plain.forward == packed.training - plain.training == 2000
    assert packed.tokens(1000) < plain.tokens(1000)
    assert budget_of(1000, "flash_attention_2") == plain
    assert budget_of(1000, "eager") == SweepBudget(forward=1, training=1, prefetched=0)


def test_a_sweep_is_smaller_if_the_training_step_keeps_the_layers_inputs_in_host_memory() -> None:
    config = AutoConfig.for_model("llama", hidden_size=320, num_hidden_layers=30)
    kept, offloaded = (sweep_budget(config, True, 0, offloaded=offloaded) for offloaded in (False, True))
    assert kept.training - offloaded.training == 30 * 320
    assert kept.tokens(1000) > offloaded.tokens(1000)
