"""Perturbed weights: the levels of rounding, the size of the noise, and that all weights come back."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from selfgen_ds.evaluation.perturbations import perturbed, rounded
from selfgen_ds.model.reductions import add_reductions


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    return add_reductions(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)))


def test_values_are_rounded_to_the_nearest_level_of_their_group() -> None:
    values = torch.tensor([[7.0, -3.4, 0.6, 0.0], [0.07, -0.034, 0.006, 0.0]])
    expected = torch.tensor([[7.0, -3.0, 1.0, 0.0], [0.07, -0.03, 0.01, 0.0]])
    torch.testing.assert_close(rounded(values, levels=7, group=None), expected)
    grouped = rounded(torch.tensor([[7.0, 1.0, 0.7, 0.1]]), levels=7, group=2)
    torch.testing.assert_close(grouped, torch.tensor([[7.0, 1.0, 0.7, 0.1]]))


def test_zeros_stay_zeros() -> None:
    assert not rounded(torch.zeros(2, 4), levels=7, group=2).any()


@pytest.mark.parametrize("kind", ["noise_0.1", "int8", "int4"])
def test_matrices_change_inside_and_come_back_with_the_same_bits(kind: str) -> None:
    model = _model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with perturbed(model, kind, seed=0):
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if "proj" in name}
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_noise_is_a_share_of_the_standard_deviation_and_a_function_of_the_seed() -> None:
    model = _model()
    weight = model.model.layers[0].mlp.up_proj.weight
    before, noises = weight.detach().clone(), []
    for seed in (0, 0, 1):
        with perturbed(model, "noise_0.1", seed):
            noises.append((weight - before).detach())
    assert noises[0].std().item() == pytest.approx(0.1 * before.std().item(), rel=0.02)
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])


def test_four_bits_have_fifteen_levels_in_every_group() -> None:
    model = _model()
    weight = model.model.layers[0].mlp.up_proj.weight
    with perturbed(model, "int4", 0):
        assert max(len(group.unique()) for group in weight.reshape(-1, 128)) <= 15


def test_embeddings_of_positions_stay_and_transposed_matrices_are_rounded_by_output() -> None:
    torch.manual_seed(0)
    model = add_reductions(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with perturbed(model, "int8", 0):
        assert torch.equal(model.transformer.wpe.weight, before["transformer.wpe.weight"])
        name = "transformer.h.0.attn.c_attn.weight"  # `[in, out]`
        found = dict(model.named_parameters())[name]
        torch.testing.assert_close(found.T, rounded(before[name].T, levels=127, group=None))
