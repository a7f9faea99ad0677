"""Contexts that real models draw to the fixed point are those of the sequential process."""

import time
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from selfgen_ds import hashing
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.packing import pack
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.methods.mixture import mix, replacement_mask
from selfgen_ds.model import generation
from selfgen_ds.model.policy import EnginePolicy, Sampling
from selfgen_ds.model.reductions import add_reductions
from tests.architectures import ARCHITECTURES
from tests.batches import padded, sample
from tests.trained import reference_probabilities, texts, token_by_token, trained_model

REPLACE, DRAW = (hashing.REPLACE, 5, 7), (hashing.DRAW, 5, 7)


pytestmark = pytest.mark.test  # a model is trained for it, which takes seconds


def samples() -> list[TrainingRow]:
    end = byte_tokenizer().eos_token_id
    rows = texts(16)
    return [sample([*p.encode()], [*c.encode(), end], i) for i, (p, c) in enumerate(rows)]


@pytest.fixture(scope="module")
def extended() -> PreTrainedModel:
    model = LlamaForCausalLM(trained_model().config).eval()
    model.load_state_dict(trained_model().state_dict())
    return add_reductions(model)


def layouts() -> dict[str, list[TokenBatch]]:
    """Return the same samples in micro-batches, with one sample per row and with several samples per row."""
    some = samples()
    rows = pack([len(s) for s in some], 100)
    return {
        "padded": [collate([[s] for s in some[:5]]), collate([[s] for s in some[5:]])],
        "packed": [collate([[some[i] for i in row] for row in rows[k::2]], packed=True) for k in range(2)],
    }


def contexts(batches: list[TokenBatch]) -> dict[int, list[int]]:
    ids = {int(i) for batch in batches for i in batch.sample_ids[batch.sample_ids >= 0]}
    return {i: [t for batch in batches for t in batch.context_ids[batch.sample_ids == i].tolist()] for i in ids}


@pytest.mark.parametrize(
    ("layout", "p", "sampling"),
    [
        ("padded", 1.0, Sampling(temperature=0.3)),
        ("packed", 0.5, Sampling(top_p=0.9)),
        ("packed", 0.1, Sampling()),
        ("padded", 0.5, Sampling()),
        ("packed", 1.0, Sampling()),
        ("padded", 0.1, Sampling(temperature=1.5)),
        ("padded", 1.0, Sampling(temperature=2.0, top_p=0.5)),
        ("packed", 0.5, Sampling(temperature=1.5, top_k=3)),
    ],
    ids=str,
)
def test_exact_draws_what_a_loop_over_the_tokens_draws(
    extended: PreTrainedModel, layout: str, p: float, sampling: Sampling
) -> None:
    alone = collate([[s] for s in samples()])
    mask = replacement_mask(alone, p, REPLACE)
    expected = token_by_token(trained_model(), alone, mask, sampling, DRAW)
    batches = layouts()[layout]
    masks = [replacement_mask(batch, p, REPLACE) for batch in batches]
    mixed, made = mix(batches, EnginePolicy(extended, end_tokens=[0], sampling=sampling), masks, "exact", DRAW)
    assert contexts(mixed) == dict(enumerate(expected))
    assert contexts(mixed) != contexts(batches)
    longest = int(mask.sum(dim=1).max())
    assert made <= longest
    if p == 1.0:
        assert 3 < made < longest


class InOrderPolicy(EnginePolicy):
    """Keeps the rows of each batch that was drawn in order."""

    def draw_in_order(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        self.rows = [int(mask.any(dim=1).sum()) for mask in masks]
        return super().draw_in_order(batches, masks, uniforms)


@pytest.mark.parametrize(
    ("name", "p", "rows_at_once"),
    [("llama", 0.25, 3), ("llama", 1.0, 64), ("gemma3_text", 0.25, 3), ("gemma3_text", 1.0, 64), ("gpt2", 0.25, 3)],
)
def test_what_is_drawn_in_order_is_what_passes_draw(name: str, p: float, rows_at_once: int) -> None:
    torch.manual_seed(0)
    fields = ARCHITECTURES[name] | {"vocab_size": 260, "initializer_range": 0.5}
    model = add_reductions(AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).eval())
    batches = layouts()["padded"]
    masks = [replacement_mask(batch, p, REPLACE) for batch in batches]
    policy = InOrderPolicy(model, end_tokens=[0], generation_batch_size=rows_at_once)
    if p < 1.0:  # rows this short need few passes
        policy.passes_in_order = 0
    by_passes, many = mix(batches, policy, masks, "exact", DRAW, max_differing_share=0.9)
    assert not hasattr(policy, "rows")
    with policy.gathered(100):
        in_order, few = mix(batches, policy, masks, "exact", DRAW, max_differing_share=0.9)
    assert sum(policy.rows) > 3
    assert contexts(in_order) == contexts(by_passes)
    assert [batch.replaced_mask.tolist() for batch in in_order] == [batch.replaced_mask.tolist() for batch in by_passes]
    assert few < many


def test_the_time_of_a_draw_in_order_decides_whether_the_next_one_is_made(
    extended: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = layouts()["padded"]
    masks = [batch.replaceable_mask for batch in batches]
    policy = InOrderPolicy(extended, end_tokens=[0], sampling=Sampling(temperature=5.0))
    generate = generation.generate

    def slow(*arguments: Any, **options: Any) -> list[list[int]]:
        time.sleep(2.0)
        return generate(*arguments, **options)

    monkeypatch.setattr(generation, "generate", slow)
    with policy.gathered(100):
        _, before = mix(batches, policy, masks, "exact", DRAW)
        assert policy.passes_in_order > 8
        del policy.rows
        _, after = mix(batches, policy, masks, "exact", DRAW)
    assert not hasattr(policy, "rows")
    assert after > before


@pytest.mark.parametrize("p", [0.02, 0.25])
def test_a_trained_model_needs_few_passes_and_draws_nothing_in_order(extended: PreTrainedModel, p: float) -> None:
    batches = layouts()["padded"]
    masks = [replacement_mask(batch, p, REPLACE) for batch in batches]
    policy = InOrderPolicy(extended, end_tokens=[0])
    with policy.gathered(100):
        _, made = mix(batches, policy, masks, "exact", DRAW)
    assert made > 1
    assert not hasattr(policy, "rows")


def test_packed_samples_are_never_drawn_in_order(extended: PreTrainedModel) -> None:
    batches = layouts()["packed"]
    policy = InOrderPolicy(extended, end_tokens=[0], sampling=Sampling(temperature=5.0))
    with policy.gathered(100):
        inside, made = mix(batches, policy, [batch.replaceable_mask for batch in batches], "exact", DRAW)
    outside, _ = mix(batches, policy, [batch.replaceable_mask for batch in batches], "exact", DRAW)
    assert made > 10
    assert contexts(inside) == contexts(outside)
    assert not hasattr(policy, "rows")


def test_rows_are_drawn_in_order_up_to_rows_at_once_and_leave_when_they_are_done(extended: PreTrainedModel) -> None:
    """Of three rows with 8 prompt tokens each, one needs 40 more tokens and two need 4."""
    lengths = [40, 4, 4]
    batch = collate([[sample([1] * 8, [2] * length + [0], i)] for i, length in enumerate(lengths)])
    seen: list[int] = []
    hook = extended.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    uniforms = torch.full((int(batch.replaceable_mask.sum()),), 0.5, dtype=torch.float64)
    for rows_at_once, expected in ((64, [3] * 32 + [1] * 8), (1, [1] * (40 + 4 + 4))):
        policy = EnginePolicy(extended, end_tokens=[0], generation_batch_size=rows_at_once)
        with policy.gathered(60):
            seen.clear()
            [drawn] = policy.draw_in_order([batch], [batch.replaceable_mask], [uniforms])
        assert seen == expected
        assert len(drawn) == sum(lengths)
    hook.remove()


def test_models_that_keep_states_are_not_drawn_from_in_order() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=8)
    model = add_reductions(AutoModelForCausalLM.from_config(config).eval())
    policy = EnginePolicy(model, end_tokens=[0])
    with policy.gathered(100):
        assert not policy.can_draw_in_order


def test_a_number_of_passes_is_never_drawn_in_order(extended: PreTrainedModel) -> None:
    batches = layouts()["padded"]
    masks = [batch.replaceable_mask for batch in batches]
    policy = InOrderPolicy(extended, end_tokens=[0])
    with policy.gathered(100):
        inside, made = mix(batches, policy, masks, 3, DRAW)
    outside, _ = mix(batches, policy, masks, 3, DRAW)
    assert made == 3
    assert contexts(inside) == contexts(outside)
    assert not hasattr(policy, "rows")


def test_one_pass_is_not_the_loop(extended: PreTrainedModel) -> None:
    alone = collate([[s] for s in samples()])
    expected = token_by_token(trained_model(), alone, alone.replaceable_mask, Sampling(), DRAW)
    mixed, _ = mix([alone], EnginePolicy(extended, end_tokens=[0]), [alone.replaceable_mask], 1, DRAW)
    assert contexts(mixed) != dict(enumerate(expected))


class CountingPolicy(EnginePolicy):
    """Keeps how many rows and tokens each pass drew."""

    def draw(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        self.drawn = [*getattr(self, "drawn", []), (sum(int(m.any(1).sum()) for m in masks), sum(map(len, uniforms)))]
        return super().draw(batches, masks, uniforms)


def test_later_passes_read_fewer_rows_and_draw_fewer_tokens(extended: PreTrainedModel) -> None:
    batches = layouts()["padded"]
    policy = CountingPolicy(extended, end_tokens=[0])
    mix(batches, policy, [batch.replaceable_mask for batch in batches], "exact", DRAW)
    for (rows, tokens), (later_rows, later_tokens) in zip(policy.drawn, policy.drawn[1:], strict=False):
        assert later_rows <= rows
        assert later_tokens < tokens
    rows, tokens = np.sum(policy.drawn, axis=0)
    assert rows < 0.8 * len(policy.drawn) * policy.drawn[0][0]
    assert tokens < 0.6 * len(policy.drawn) * policy.drawn[0][1]


# --- the law of the draws ---

VOCABULARY = 5


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.7,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return add_reductions(LlamaForCausalLM(config).eval())


PROMPT, ANSWER = [1, 2], [3, 0, 4, 1]


@torch.no_grad()
def joint(model: PreTrainedModel, mask: list[bool], sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Return the probability of every context that ancestral sampling of the masked tokens can give."""
    found: dict[tuple[int, ...], float] = {}
    choices = [range(VOCABULARY) if masked else [token] for token, masked in zip(ANSWER, mask, strict=True)]
    for ids in product(*choices):
        logits = model(torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 :]
        steps = zip(logits, ids, mask, strict=False)
        probability = prod(reference_probabilities(v, sampling)[token] for v, token, masked in steps if masked)
        found[ids] = probability
    return found


def chi_square(
    model: PreTrainedModel, mask: list[bool], sampling: Sampling, passes: object, count: int = 2500
) -> tuple[float, int]:
    """Compare contexts of many samples with ancestral sampling; return chi-square and its degrees of freedom."""
    batch = padded([PROMPT] * count, [ANSWER] * count, list(range(count)))
    masks = [torch.tensor([False, False, *mask]).expand(count, -1)]
    policy = EnginePolicy(model, end_tokens=[0], sampling=sampling)
    (mixed,), _ = mix([batch], policy, masks, passes, DRAW)  # type: ignore[arg-type]
    ids, counts = mixed.context_ids[:, len(PROMPT) :].unique(dim=0, return_counts=True)
    seen = dict(zip(map(tuple, ids.tolist()), counts.tolist(), strict=True))
    expected = {key: count * value for key, value in joint(model, mask, sampling).items()}
    often = [key for key, value in expected.items() if value >= 5]
    rest, seen_rest = (count - sum(some.get(key, 0) for key in often) for some in (expected, seen))
    cells = [(seen.get(key, 0), expected[key]) for key in often] + ([(seen_rest, rest)] if rest >= 5 else [])
    return sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1


LAWS = pytest.mark.parametrize(
    ("mask", "sampling"),
    [
        ([True, False, True, False], Sampling()),
        ([True, True, True, False], Sampling()),
        ([True, True, True, False], Sampling(temperature=2.0)),
        ([True, True, True, False], Sampling(temperature=1.5, top_p=0.8)),
    ],
    ids=["every other", "all", "temperature", "top-p"],
)


@LAWS
@pytest.mark.parametrize("count", [2500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_exact_draws_have_the_law_of_ancestral_sampling(
    tiny: PreTrainedModel, mask: list[bool], sampling: Sampling, count: int
) -> None:
    statistic, freedom = chi_square(tiny, mask, sampling, "exact", count)
    assert freedom > 8
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_a_single_pass_has_another_law(tiny: PreTrainedModel) -> None:
    statistic, freedom = chi_square(tiny, [True, False, True, False], Sampling(), 1)
    assert statistic > 3 * (freedom + 5 * (2 * freedom) ** 0.5)
