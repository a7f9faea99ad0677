"""The excess error: its divergences against plain transformers, and its value in cases that are known."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.evaluation.answers import EvaluationRequests, _after
from selfgen_ds.evaluation.curves import Curves
from selfgen_ds.evaluation.excess_error import divergences
from selfgen_ds.evaluation.metrics import aggregate, values
from selfgen_ds.evaluation.scores import evaluate
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.model.reductions import add_reductions
from tests.batches import sample


def _policy(seed: int) -> EnginePolicy:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=258, max_position_embeddings=64, initializer_range=0.3, **sizes)
    return EnginePolicy(add_reductions(LlamaForCausalLM(config).eval()), end_tokens=[257])


ROWS = [sample([1, 2, 3], [4, 5, 6, 257], 0), sample([7], [8, 9, 257], 1)]


def test_the_divergences_are_those_of_the_whole_distributions() -> None:
    policy, oracle = _policy(0), _policy(1)
    found = divergences(policy, oracle, ROWS)
    for row, ours in zip(ROWS, found, strict=True):
        ids = torch.tensor(row.context_ids)[None]
        with torch.no_grad():
            p, o = (one.model(ids).logits[0].double().log_softmax(-1) for one in (policy, oracle))
        expected = (o.exp() * (o - p)).sum(-1)[len(row.prompt_ids) - 1 : -1]
        assert ours == pytest.approx(expected.tolist(), rel=1e-4)


def test_errors_that_do_not_feed_on_each_other_are_no_excess() -> None:
    assert values([{"excess_error": [6.0, 6.0]}])["excess_error"] == 0.0
    assert values([{"excess_error": [6.0, 3.0]}])["excess_error"] == pytest.approx(100.0)


def test_a_model_that_is_its_own_oracle_has_no_excess_error() -> None:
    policy = _policy(0)
    scores = evaluate(policy, ROWS, byte_tokenizer(), 2, EvaluationRequests(oracle=policy))
    assert "excess_error" not in aggregate(scores), "nothing to divide by"
    assert not Curves(scores).excess_error()


def test_the_excess_error_of_a_row_sums_the_positions_that_both_contexts_have() -> None:
    policy, oracle = _policy(0), _policy(1)
    scores = evaluate(policy, ROWS, byte_tokenizer(), 2, EvaluationRequests(oracle=oracle, sample_temperatures=(1.0,)))
    given = divergences(policy, oracle, ROWS)
    for score, of_reference in zip(scores, given, strict=True):
        own, reference = score.divergences
        assert len(own) == len(reference) >= 1
        assert reference == pytest.approx(of_reference[: len(reference)], rel=1e-5)
        assert own[0] == pytest.approx(reference[0], rel=1e-5), "nothing of its own stands before the first token"
        assert score.statistics["excess_error"] == [sum(own), sum(reference)]
    total = [sum(score.statistics["excess_error"][i] for score in scores) for i in range(2)]
    assert aggregate(scores)["excess_error"] == pytest.approx(100 * (total[0] / total[1] - 1))


def test_an_oracle_whose_head_is_padded_further_is_compared_over_the_tokens_that_both_have() -> None:
    policy, oracle, padded = _policy(0), _policy(1), _policy(1)
    head = padded.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.cat([head.weight, torch.randn(6, 32)]))
    for ours, theirs in zip(*(divergences(policy, one, ROWS) for one in (oracle, padded)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_context_after_an_answers_end_token_is_not_read() -> None:
    policy = _policy(0)
    row = _after(policy, ROWS[0], [4, 257])
    assert row.loss_mask.tolist() == [False] * 3 + [True, True, False, False]
    cut = _after(policy, ROWS[0], [4, 5])
    assert cut.loss_mask.tolist() == [False] * 3 + [True, True, True, False]
