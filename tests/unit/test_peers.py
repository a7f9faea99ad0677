"""Parts of `benchmarks/peers.py` that need no TRL: turns, peak memory, and generation forced to a reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contenders import KeepReference
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from turns import Loop, Turns


def test_loops_step_in_turn_and_their_errors_are_raised() -> None:
    done: list[tuple[str, int]] = []

    def loop(name: str) -> Loop:
        def steps(hold: Callable[[], None]) -> None:
            for number in range(2):
                hold()
                done.append((name, number))
            hold()
            raise ValueError(name)

        return steps

    first, second = (Turns(loop(name), measured=False) for name in "ab")
    assert done == [("a", 0), ("b", 0)]  # the first step is part of the construction
    second.step()
    first.step()
    assert done[2:] == [("b", 1), ("a", 1)]
    with pytest.raises(ValueError, match="a"):
        first.step()


def test_the_peak_is_the_memory_that_a_loop_holds_and_the_most_that_a_step_adds() -> None:
    def loop(hold: Callable[[], None]) -> None:
        weights = torch.zeros(1000)
        hold()
        states = torch.zeros(3000)
        while True:
            hold()
            (weights + 1).sum()
            (states + 1).sum()

    turns = Turns(loop, measured=True)
    turns.step()
    for _ in range(2):
        assert turns.peak() == 4 * (1000 + 3000 + 3000 + 1)


def test_generation_is_forced_to_the_reference_at_positions_that_are_not_drawn() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    target, drawn = torch.randint(50, (3, 12)), torch.rand(3, 12) < 0.5
    drawn[:, :4] = False
    settings = GenerationConfig(max_new_tokens=8, min_new_tokens=8, do_sample=True, top_k=0, pad_token_id=0)
    processors = LogitsProcessorList([KeepReference(target, drawn)])
    context = model.generate(target[:, :4], generation_config=settings, logits_processor=processors)
    assert torch.equal(context[~drawn], target[~drawn])
    assert (context[drawn] != target[drawn]).float().mean() > 0.5
