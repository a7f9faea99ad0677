"""Check answers in one process: the rows that are computed, the tokens that noise draws, the memory that is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from selfgen_ds import hashing
from selfgen_ds.model import budget, gathering, generation
from selfgen_ds.model.policy import EnginePolicy, Sampling
from selfgen_ds.model.reductions import add_reductions
from tests.architectures import ARCHITECTURES, attention
from tests.tiers import sweep

END = 39
_SPECIAL: dict[str, Any] = {"vocab_size": 40, "eos_token_id": END, "pad_token_id": None, "bos_token_id": None}
# Models whose caches hold states, which single rows cannot leave. Mamba's output has the cache under another name.
_STATES: dict[str, dict[str, Any]] = {
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "lfm2": ARCHITECTURES["llama"] | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return add_reductions(build("llama"))


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = (ARCHITECTURES | _STATES)[name] | _SPECIAL | {"initializer_range": 0.5}
    kind = None if name in _STATES else attention(name)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), attn_implementation=kind).eval()


def keyed(stream: int) -> Any:
    def uniforms(prompts: Tensor, positions: Tensor) -> Tensor:
        return hashing.uniform(stream, prompts, positions)

    return uniforms


def forwards(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return a list to which every forward adds its number of rows and tokens."""
    seen: list[tuple[int, int]] = []

    def hook(module: PreTrainedModel, args: Any, kwargs: Any) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


class Countdown(LlamaForCausalLM):
    """Predicts token t - 1 after token t, down to the end token 0."""

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        assert input_ids is not None
        output = super().forward(input_ids=input_ids, **kwargs)
        following = (input_ids[:, -1:] - 1).clamp(min=0)
        output.logits = torch.zeros(*following.shape, self.config.vocab_size).scatter_(2, following[..., None], 9.0)
        return output


def test_rows_that_are_finished_are_dropped_and_prompts_of_similar_length_go_together() -> None:
    config = LlamaConfig(vocab_size=128, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = Countdown(config).eval()
    seen = forwards(model)
    policy = EnginePolicy(model, end_tokens=[0], generation_batch_size=3)
    answers = policy.complete([[100], [9, 5], [9, 9, 9, 40], [2]], 90)
    assert answers == [list(range(99, 9, -1)), [4, 3, 2, 1, 0], list(range(39, -1, -1)), [1, 0]]
    assert seen[0] == (3, 4)
    # Finished rows are dropped every 32 tokens: first the row from 5, then the row from 40.
    assert [rows for rows, _ in seen] == [3] * 32 + [2] * 32 + [1] * 26 + [1] * 2
    assert [tokens for _, tokens in seen].count(1) == len(seen) - 1


@sweep("name", ["mamba", "lfm2", "gemma3_text"], check=2)
def test_answers_of_models_with_other_caches_are_plain_generates(name: str) -> None:
    plain = build(name)
    policy = EnginePolicy(plain, end_tokens=[END, 20, 21, 7])
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12]]
    lengths = set()
    for prompt, answer in zip(prompts, policy.complete(prompts, 50), strict=True):
        settings: dict[str, Any] = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": policy.end_tokens}
        output = plain.generate(torch.tensor([prompt]), pad_token_id=END, **settings)
        assert answer == output[0, len(prompt) :].tolist()
        lengths.add(len(answer))
    assert len(lengths) > 1 or name == "gemma3_text"


def test_sampled_first_tokens_have_the_models_distribution(model: PreTrainedModel) -> None:
    policy = EnginePolicy(model, end_tokens=[END])
    prompt, count = [1, 2, 3], 2000
    answers = policy.complete([prompt] * count, 1, keyed(1), Sampling(temperature=3.0, top_k=8))
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1] / 3.0
    expected = torch.zeros(40).scatter(0, logits.topk(8).indices, logits.topk(8).values.softmax(0)) * count
    found = torch.bincount(torch.tensor(answers)[:, 0], minlength=40)
    assert found[expected == 0].sum() == 0
    assert (expected[expected > 0] > 5).all()
    chi_square = ((found - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_square < 24.3  # with 7 degrees of freedom, exceeded once in a thousand samples


def test_an_answer_is_drawn_as_ancestral_sampling_with_its_noise_draws(model: PreTrainedModel) -> None:
    policy = EnginePolicy(model, end_tokens=[END], sampling=Sampling(temperature=1.5), generation_batch_size=2)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    answers = policy.complete(prompts, 40, keyed(2))
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = list(prompt)
        for position in range(40):
            with torch.no_grad():
                p = (model(torch.tensor([ids])).logits[0, -1].double() / 1.5).softmax(0).cumsum(0)
            ids.append(int((p < hashing.uniform(2, number, position)).sum()))
            if ids[-1] == END:
                break
        assert answer == ids[len(prompt) :]


def test_other_noise_gives_another_answer_and_no_noise_the_most_probable(model: PreTrainedModel) -> None:
    policy = EnginePolicy(model, end_tokens=[END], sampling=Sampling(temperature=2.0))
    one, other, again = (policy.complete([[1, 2, 3]], 30, keyed(stream)) for stream in (1, 2, 1))
    assert one == again != other
    cold = policy.complete([[1, 2, 3]], 30, keyed(1), Sampling(temperature=1e-4))
    assert policy.complete([[1, 2, 3]], 30) == cold != one


@pytest.mark.parametrize(("prompt", "answer"), [(31, 34), (32, 33), (33, 32), (60, 5), (64, 1)])
def test_an_answer_ends_where_the_models_positions_do(prompt: int, answer: int) -> None:
    config = LlamaConfig(vocab_size=128, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.max_position_embeddings = 64
    model = Countdown(config).eval()
    policy = EnginePolicy(model, end_tokens=[0])
    [short, longest] = policy.complete([[40], [127] * prompt], 90)
    assert short == list(range(39, -1, -1))
    assert longest == list(range(126, 126 - answer, -1))  # no forward reads the last token, so it takes no position


def test_no_prompts_have_no_answers(model: PreTrainedModel) -> None:
    policy = EnginePolicy(model, end_tokens=[END])
    with policy.gathered(10):
        assert policy.complete([], 10) == policy.complete([], 10, keyed(1)) == []


@pytest.mark.parametrize("name", [*ARCHITECTURES, *_STATES])
def test_the_cache_of_a_row_is_what_generation_keeps(name: str) -> None:
    plain = build(name)
    with torch.no_grad():
        counted = budget.cache_bytes(budget.one_token_cache(plain), 30)
        kept = plain.generate(torch.ones(1, 30).long(), max_new_tokens=1, return_dict_in_generate=True)
    exact = budget.cache_bytes(kept.past_key_values, 1)
    # Between two tokens, a sliding window holds one token less.
    assert exact <= counted <= exact * 1.15


def test_whole_weights_are_generated_from_in_as_many_rows_as_fit(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = EnginePolicy(model, end_tokens=[END])
    row = policy._row_bytes(50)
    monkeypatch.setattr(gathering, "free_bytes", lambda: int(5.5 * row / 0.9))
    with policy.gathered(50):
        assert (policy.rows_at_once, policy.sharded) == (5, False)
    monkeypatch.setattr(gathering, "free_bytes", lambda: 0)
    with policy.gathered(50):
        assert policy.rows_at_once == 1
        assert len(policy.complete([[1], [2]], 3)) == 2
    assert policy.rows_at_once == 64


def test_progress_counts_the_tokens_by_which_answers_grow(model: PreTrainedModel) -> None:
    grown: list[int] = []
    generation.generate(model, [[1, 2], [3]], 70, [], None, progress=grown.append)
    assert sum(grown) == 70
    assert len(grown) > 1
