"""A small model that has learned something, and reference draws from it, token by token."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from selfgen_ds import hashing
from selfgen_ds.data.batches import TokenBatch
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.model.policy import Sampling
from tests.batches import lengths

_LETTERS = "abcdefghijkl"


def texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return prompts and completions in which each letter depends on the two before it."""
    table = np.random.default_rng(0).gumbel(size=(12, 12, 12)) * 2.5
    weights = np.exp(table)
    rng = random.Random(seed)

    def text() -> str:
        ids = rng.choices(range(12), k=2)
        for _ in range(rng.randrange(6, 45)):
            ids += rng.choices(range(12), weights=weights[ids[-2], ids[-1]].tolist())
        return "".join(_LETTERS[i] for i in ids)

    rows = [text() for _ in range(count)]
    return [(row[:4], row[4:]) for row in rows]


@cache
def trained_model() -> LlamaForCausalLM:
    """Return a byte-level model that predicts the letters of `texts` far better than their frequencies do."""
    torch.manual_seed(0)
    end = byte_tokenizer().eos_token_id
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=end,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    rows = [[*(prompt + completion).encode(), end] for prompt, completion in texts(2000, seed=1)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(120):
        some = rows[step * 16 : (step + 1) * 16]
        labels = torch.full((16, max(map(len, some))), -100)
        for row, ids in enumerate(some):
            labels[row, : len(ids)] = torch.tensor(ids)
        logits = model(labels.clamp(min=0)).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.75 * np.log(12)
    return model.eval()


def reference_probabilities(logits: Tensor, sampling: Sampling) -> np.ndarray:
    """Return the probabilities that a token is drawn from: `[vocab]` float64 from `[vocab]` logits."""
    values = logits.double().numpy() / sampling.temperature
    if sampling.top_k:
        values = np.where(values >= np.sort(values)[-sampling.top_k], values, -np.inf)
    p = np.exp(values - values.max())
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    kept = np.zeros_like(p)
    keep = order[before < sampling.top_p]
    kept[keep] = p[keep]
    return kept / kept.sum()


def reference_draw(logits: Tensor, uniform: float, sampling: Sampling) -> int:
    """Draw a token by the inverse of the cumulative distribution."""
    cumulative = np.cumsum(reference_probabilities(logits, sampling))
    return int(np.argmax(cumulative >= uniform * cumulative[-1]))


@torch.no_grad()
def token_by_token(
    model: PreTrainedModel, batch: TokenBatch, mask: Tensor, sampling: Sampling, keys: tuple[int, ...]
) -> list[list[int]]:
    """Return the context of each row, its masked tokens drawn one after the other. A row must hold one sample."""
    context = batch.target_ids.clone()
    uniforms = hashing.uniform(*keys, batch.sample_ids, batch.position_ids)
    for t in range(1, context.shape[1]):
        rows = mask[:, t].nonzero().flatten()
        if len(rows):
            logits = model(context[rows, :t]).logits[:, -1]
            for row, values in zip(rows.tolist(), logits, strict=True):
                context[row, t] = reference_draw(values, float(uniforms[row, t]), sampling)
    return [row[:length].tolist() for row, length in zip(context, lengths(batch), strict=True)]
