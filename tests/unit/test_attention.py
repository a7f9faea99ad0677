"""Attention by transformers' names: what cannot run here is told before a model is built."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from selfgen_ds.model.attention import FLEX, is_flash, masks_packed_rows, problem
from selfgen_ds.model.reductions import backbone, packed_settings


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention"])
def test_attention_that_torch_brings_can_be_evaluated_on_a_cpu(name: str) -> None:
    assert problem(name, on_cpu=True, trains=False) == ""


def test_flex_attention_is_not_trained_on_a_cpu() -> None:
    assert "no backward" in problem(FLEX, on_cpu=True, trains=True)
    assert problem(FLEX, on_cpu=False, trains=True) == ""


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_flash_attention_needs_a_gpu_and_a_package(name: str) -> None:
    for on_cpu in (True, False):
        assert problem(name, on_cpu, trains=True).startswith(f"{name} needs a GPU, and its package")


def test_a_kernel_of_the_hub_needs_the_package_that_fetches_it() -> None:
    assert problem("kernels-community/flash-attn2", on_cpu=False, trains=True).endswith("needs the package kernels")


@pytest.mark.parametrize("name", ["flash", "spda", "paged|sdpa", ""])
def test_an_unknown_name_is_refused_with_the_names_there_are(name: str) -> None:
    told = problem(name, on_cpu=False, trains=True)
    assert "eager, flash_attention_2, flash_attention_3" in told
    assert repr(name) in told


def test_a_name_that_the_users_code_has_registered_is_known() -> None:
    AttentionInterface.register("attention_of_my_own", AttentionInterface()["sdpa"])
    assert problem("attention_of_my_own", on_cpu=True, trains=True) == ""


def test_packed_rows_need_a_mask_but_with_flash_and_flex_attention() -> None:
    flash = ("flash_attention_3", "kernels-community/vllm-flash-attn3")
    assert all(map(is_flash, flash))
    assert not any(map(masks_packed_rows, (*flash, FLEX)))
    assert all(map(masks_packed_rows, ("sdpa", "eager")))


@pytest.mark.slow  # compiling takes most of a minute
def test_flex_attention_keeps_the_samples_of_packed_rows_apart() -> None:
    def hidden(name: str) -> Tensor:
        torch.manual_seed(0)
        fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **fields, attn_implementation=name)).eval()
        ids = torch.randint(0, 50, (2, 40))
        position_ids = torch.cat([torch.arange(15), torch.arange(25)])[None].expand(2, -1)
        with torch.no_grad():
            output: Tensor = backbone(model, ids, packed_settings(model, position_ids)).last_hidden_state
        return output

    torch.testing.assert_close(hidden(FLEX), hidden("sdpa"), rtol=1e-4, atol=1e-5)
