"""`selfgen-ds inspect`: what a recipe's rows become, before anything is spent on training them.

One process, no DeepSpeed: counts of rows read, truncated and refused, the lengths, and some training rows with what
the model is given, what it learns, what may be replaced, and what it drew itself.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase, set_seed

from selfgen_ds.config import Recipe
from selfgen_ds.data.batches import StepBatches, TokenBatch, collate
from selfgen_ds.data.samples import Sample, Samples, end_tokens
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.methods.method import Method, RoundMethod
from selfgen_ds.model import probe
from selfgen_ds.model.loading import build_model, model_config, vocabulary
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.ranks import process_group
from selfgen_ds.setup.inputs import (
    check_positions,
    check_settings,
    check_shares,
    load_data,
    load_eval_data,
    load_method,
    load_step_batches,
    sampling,
)

_STYLES = {
    "prompt": "dim",
    "replaceable": "green underline",
    "target": "bold green",
    "drawn": "bold red",
    "answer": "red",
}
_MEANING = {
    "prompt": "read, not learned",
    "replaceable": "learned, and may be replaced in the context",
    "target": "learned, never replaced",
    "drawn": "learned, replaced in the context by what the model drew",
    "answer": "the model's own answer: read, not learned",
}
_BARS = 12


def inspect(recipe: Recipe, overrides: set[str], rows: int, draw: bool) -> None:
    """Print it.

    Args:
        overrides: Settings that were given on the command line.
        rows: Training rows to show.
        draw: Load the model too, and let the method draw with the replacement probability of the last step.

    Raises:
        InputError: What `train` would refuse in recipe and data; counts and lengths are printed before.
    """
    if rows < 0:
        raise InputError(f"--rows: expected 0 or more, got {rows}")
    check_settings(recipe, overrides)
    tokenizer = load_tokenizer(recipe.model)
    check_positions(recipe, model_config(recipe.model, tokenizer))
    samples = load_data(recipe, tokenizer)
    windows = load_step_batches(
        recipe, samples, step_size=max(1, rows), micro_batch_size=max(1, rows), rank=0, world_size=1, epochs=1
    )
    eval_samples = [] if recipe.data.eval is None else load_eval_data(recipe, tokenizer)
    console = Console(highlight=False)
    _print_counts(console, samples + eval_samples, tokenizer)
    _print_lengths(console, np.concatenate([source.table["length"][:] for source in samples]))
    if recipe.data.packing:
        tokens = sum(int(np.sum(source.table["length"][:], dtype=np.int64)) for source in samples)
        full = tokens / (len(windows) * recipe.data.max_length)
        console.print(f"packed into {len(windows)} rows of {recipe.data.max_length} tokens, {full:.1%} of them real\n")
    check_shares(recipe, samples + eval_samples)
    method = load_method(recipe, tokenizer, samples, windows, total_steps=1)
    if rows:
        if draw and "replace_probability" in method.settings:
            p = method.replace_probability(0 if isinstance(method, RoundMethod) else 1)  # of one step or round
            console.print(f"drawn with p = {p:g}, that of the last step or round\n")
        window = _draw(recipe, windows, samples, tokenizer, method) if draw else windows.window(0)
        _print_rows(console, window[0], tokenizer)


def _draw(
    recipe: Recipe, windows: StepBatches, samples: list[Samples], tokenizer: PreTrainedTokenizerBase, method: Method
) -> list[TokenBatch]:
    config = model_config(recipe.model, tokenizer)
    form = probe.check(recipe.model, config, recipe.data.packing)
    set_seed(recipe.seed)
    model = build_model(recipe.model, config, form, vocabulary(tokenizer)).to(process_group.device())
    policy = EnginePolicy(model, model, end_tokens=end_tokens(samples, tokenizer), sampling=sampling(recipe))
    if isinstance(method, RoundMethod):
        shown = _samples_of(windows.window(0)[0], samples)
        rows, _ = method.rows(shown, policy, 0)
        batch = collate([[row.sample()] for row in rows])
        return [
            replace(batch, replaceable=collate([[s] for s in shown]).replaceable) if method.keeps_lengths else batch
        ]
    last = 1  # of one step: where a growing schedule has reached its end
    window = [batch.to(policy.device) for batch in windows.window(0)]
    return [batch.to("cpu") for batch in method.contexts(window, policy, last)]


def _samples_of(batch: TokenBatch, samples: list[Samples]) -> list[Sample]:
    shown = batch.sample_ids[batch.sample_ids >= 0].unique()
    rows = ((source, source.first_id + np.array(source.table["sample_id"])) for source in samples)
    return [source[i] for source, ids in rows for i in np.flatnonzero(np.isin(ids, shown)).tolist()]


def _print_counts(console: Console, samples: list[Samples], tokenizer: PreTrainedTokenizerBase) -> None:
    for source in samples:
        closing = " ".join(tokenizer.convert_ids_to_tokens(source.closing_ids)) or "nothing"
        console.print(
            f"{source.name}: {source.read} rows read, {len(source)} used ({source.truncated} truncated), "
            f"{source.refused} refused; responses end with {closing}",
            markup=False,
            soft_wrap=True,
        )


def _print_lengths(console: Console, lengths: np.ndarray) -> None:
    console.print(f"\ntokens a sample: {lengths.min()} to {lengths.max()}, mean {lengths.mean():.1f}")
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, _BARS + 1).astype(int))
    counts, _ = np.histogram(lengths, bins=edges)
    for count, low, behind in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * round(50 * count / counts.max())
        console.print(f"{low:8} to {behind - 1:<8}{count:>9}  {bar}", soft_wrap=True)
    console.print()


def _print_rows(console: Console, batch: TokenBatch, tokenizer: PreTrainedTokenizerBase) -> None:
    legend = Text()
    for kind, meaning in _MEANING.items():
        legend.append(kind, style=_STYLES[kind]).append(f": {meaning}\n")
    if not console.is_terminal:
        legend.append("for: the reference's tokens that were replaced\n")
    console.print(legend)
    for row in range(len(batch.context)):
        for sample_id in dict.fromkeys(batch.sample_ids[row][batch.sample_ids[row] >= 0].tolist()):
            here = batch.sample_ids[row] == sample_id
            console.rule(f"row {row + 1}, sample {sample_id}, {int(here.sum())} tokens", align="left")
            kinds = np.where(batch.replaceable[row][here], "replaceable", "target")
            kinds = np.where(batch.loss_mask[row][here], kinds, "prompt")
            drawn = np.where(batch.loss_mask[row][here], "drawn", "answer")
            kinds = np.where(batch.drawn[row][here], drawn, kinds)
            tokens = zip(kinds, batch.context[row][here].tolist(), batch.target[row][here].tolist(), strict=True)
            console.print(_marked(list(tokens), tokenizer, console.is_terminal), soft_wrap=True)


def _marked(tokens: list[tuple[str, int, int]], tokenizer: PreTrainedTokenizerBase, in_colour: bool) -> Text:
    """Runs of one kind in their colour, or behind their name where there are no colours."""
    text = Text()
    for kind, run in groupby(tokens, key=lambda token: token[0]):
        _, context, target = zip(*run, strict=True)
        text.append("" if in_colour else f"[{kind}]").append(tokenizer.decode(context), style=_STYLES[kind])
        if kind == "drawn":
            text.append("" if in_colour else "[for]").append(tokenizer.decode(target), style="dim strike")
    return text
