"""The sizes of every check on a GPU and on a CPU, which runs the same code to show that the code is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_30_MILLION = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
_8_BILLION = {  # Llama 3 8B
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
_WIDE = {  # four layers of Llama 3.2 1B
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of all checks on one kind of device."""

    dtype: Literal["float32", "bfloat16"]
    deepspeed: str
    """The DeepSpeed JSON of the runs that a check starts itself."""
    head_positions: int
    head_width: int
    head_vocabulary: int
    draw_chunks: tuple[int, ...]
    model: dict[str, Any]
    """The model that is trained, killed and resumed, and compared with plain transformers."""
    steps: int
    """Optimizer steps of the run that is killed."""
    save_every: int
    memory_steps: int
    """Optimizer steps over which the memory has to stay the same."""
    bench: list[str]
    """Options of `selfgen-ds bench` for the cost of a step."""
    bench_steps: int
    loss_positions: int
    loss_vocabulary: int
    generating_model: dict[str, Any]
    generated_rows: int
    prompt_length: int
    new_tokens: int
    pass_rows: int
    pass_length: int
    packed_model: dict[str, Any]
    packed_lengths: tuple[int, ...]
    rollouts: list[str]
    """Options of `selfgen-ds bench` for the cost of rounds."""
    stall_seconds: float


_BENCH_ON_CPU = [
    *("--config", "recipes/bench.yaml", "--data.max_length", "48", "--train.micro_batch_size", "2"),
    *("--model.preset", str(_SMALL | {"vocab_size": 600})),
]

SIZES = {
    "cuda": Sizes(
        dtype="bfloat16",
        deepspeed="ds_configs/zero3.json",
        head_positions=8192,
        head_width=4096,
        head_vocabulary=131072,
        draw_chunks=(32, 128, 256, 1024),
        model=_30_MILLION,
        steps=100,
        save_every=20,
        memory_steps=100,
        bench=["--config", "recipes/bench-1b.yaml"],
        bench_steps=7,
        loss_positions=4096,
        loss_vocabulary=131072,
        generating_model=_8_BILLION,
        generated_rows=64,
        prompt_length=256,
        new_tokens=128,
        pass_rows=4,
        pass_length=2048,
        packed_model=_WIDE,
        packed_lengths=(2048, 8192),
        rollouts=["--config", "recipes/bench-1b.yaml", "--data.max_length", "512"],
        stall_seconds=8.0,
    ),
    "cpu": Sizes(
        dtype="float32",
        deepspeed="ds_configs/zero3_cpu.json",
        head_positions=256,
        head_width=32,
        head_vocabulary=1000,
        draw_chunks=(16, 32, 128),
        model=_SMALL,
        steps=60,
        save_every=10,
        memory_steps=30,
        bench=_BENCH_ON_CPU,
        bench_steps=2,
        loss_positions=4096,  # more logits than the loss holds at once
        loss_vocabulary=16384,
        generating_model=_SMALL | {"vocab_size": 600},
        generated_rows=4,
        prompt_length=8,
        new_tokens=16,
        pass_rows=2,
        pass_length=64,
        packed_model=_SMALL,
        packed_lengths=(48, 96),
        rollouts=_BENCH_ON_CPU,
        stall_seconds=2.0,
    ),
}
