"""`selfgen-ds inspect`: show the training rows that a recipe produces, before any training.

Prints the counts of rows read, truncated, and refused, the lengths, and some training rows with their prompts, learned
tokens, replaceable tokens, and drawn tokens. Runs in one process, without DeepSpeed.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PretrainedConfig, PreTrainedTokenizerBase, set_seed

from selfgen_ds.config import Recipe
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.samples import Samples, end_tokens
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.errors import Problems
from selfgen_ds.methods.method import Method
from selfgen_ds.model import probe
from selfgen_ds.model.loading import build_model, model_config, vocabulary
from selfgen_ds.model.policy import EnginePolicy, Sampling
from selfgen_ds.model.probe import Traits
from selfgen_ds.ranks import process_group
from selfgen_ds.setup.inputs import load_method, load_samples, load_step_batches
from selfgen_ds.validation.inputs import check_attention, check_positions, check_quantization, check_shares
from selfgen_ds.validation.options import check_inspect
from selfgen_ds.validation.settings import check_settings

_KINDS = {
    "prompt": ("dim", "read, not learned"),
    "replaceable": ("green underline", "learned, and may be replaced in the context"),
    "target": ("bold green", "learned, never replaced"),
    "drawn": ("bold red", "learned, replaced in the context by a token that the model drew"),
    "answer": ("red", "the model's answer: read, not learned"),
}
"""Kind of a token -> style and meaning."""
_BARS = 12  # of the histogram of lengths


def inspect(recipe: Recipe, overrides: set[str], rows: int, draw: bool) -> None:
    """Print the counts, the lengths, and some rows of a recipe's data.

    Args:
        overrides: Settings given on the command line.
        rows: Number of training rows to show.
        draw: Load the model too, and let the method draw with the replacement probability of the last step or round.

    Raises:
        InputError: `train` would refuse the recipe or the data. If too many rows are truncated or refused, counts,
            lengths and the rows are printed first.
    """
    if recipe.train.epochs is None and recipe.train.max_steps is None:  # the rows do not depend on either
        recipe.train.epochs = 1.0
    if recipe.train.rows_per_step is None and recipe.train.micro_batch_size is None:
        recipe.train.micro_batch_size = 1
    problems = Problems()
    check_inspect(problems, rows)
    check_settings(problems, recipe, overrides)
    problems.raise_all()
    tokenizer = load_tokenizer(recipe.model)
    config = model_config(recipe.model, tokenizer)
    check_positions(problems, recipe, config)
    check_attention(recipe)
    check_quantization(problems, config)
    with problems.collect():
        traits = probe.check(recipe.model, config, recipe.data.packing)
    problems.raise_all()
    samples, eval_samples = load_samples(problems, recipe, tokenizer)
    problems.raise_all()
    step_batches = load_step_batches(
        recipe, samples, step_size=max(1, rows), micro_batch_size=max(1, rows), rank=0, world_size=1, epochs=1
    )
    console = Console(highlight=False)
    lengths = np.concatenate([source.table["length"][:] for source in samples])
    _print_counts(console, samples + eval_samples, tokenizer)
    whole_lengths = [np.concatenate([source.table["whole_length"][:], source.too_long]) for source in samples]
    _print_lengths(console, np.concatenate(whole_lengths).astype(np.int64), recipe)
    if recipe.data.packing:
        share = lengths.sum(dtype=np.int64) / (len(step_batches) * recipe.data.max_length)
        size = f"{len(step_batches)} rows of {recipe.data.max_length} tokens"
        console.print(f"packed into {size}; {share:.1%} of the positions are used\n")
    method = load_method(recipe, tokenizer, samples, step_batches, total_steps=1)
    if rows:
        if draw and "replace_probability" in method.settings:
            p = method.replace_probability(1 if method.as_round_method() is None else 0)
            console.print(f"drawn with p = {p:g}, the value in the last step or round\n")
        batch = step_batches.at(0)[0]
        if draw:
            batch = _draw(batch, samples, method, _policy(recipe, config, traits, samples, tokenizer))
        _print_rows(console, batch, tokenizer)
    check_shares(problems, recipe, samples + eval_samples)
    problems.raise_all()


def _policy(
    recipe: Recipe,
    config: PretrainedConfig,
    traits: Traits,
    samples: list[Samples],
    tokenizer: PreTrainedTokenizerBase,
) -> EnginePolicy:
    """Load the model before training, in this process."""
    set_seed(recipe.seed)
    model = build_model(recipe.model, config, traits.logit_transform, vocabulary(tokenizer)).to(process_group.device())
    return EnginePolicy(
        model,
        end_tokens=end_tokens(samples, tokenizer),
        sampling=Sampling.of(recipe.selfgen),
        sharing=traits.sharing,
    )


def _draw(batch: TokenBatch, samples: list[Samples], method: Method, policy: EnginePolicy) -> TokenBatch:
    """Return a batch as the method has the model read it in the last step, or in a round."""
    if (round_method := method.as_round_method()) is not None:
        rows, _ = round_method.rows(_samples_of(batch, samples), policy, 0)
        return collate([[row] for row in rows])
    # Of 1 step in all, step 1 is past the last one, so that a growing schedule has reached its final value.
    (drawn,) = method.contexts([batch], policy, 1)
    return drawn


def _samples_of(batch: TokenBatch, samples: list[Samples]) -> list[TrainingRow]:
    """Return the samples whose rows a batch holds."""
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


def _print_lengths(console: Console, lengths: np.ndarray, recipe: Recipe) -> None:
    """Print the lengths of the rows before any of them is cut or left out because of its length."""
    console.print(
        f"\ntokens per row: {lengths.min()} to {lengths.max()}, mean {lengths.mean():.1f}, "
        f"95 % have at most {np.quantile(lengths, 0.95, method='higher')}; data.max_length is {recipe.data.max_length}",
        soft_wrap=True,
    )
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, _BARS + 1).astype(int))
    counts, _ = np.histogram(lengths, bins=edges)
    for count, low, end in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * round(50 * count / counts.max())
        console.print(f"{low:8} to {end - 1:<8}{count:>9}  {bar}", soft_wrap=True)
    console.print()


def _print_rows(console: Console, batch: TokenBatch, tokenizer: PreTrainedTokenizerBase) -> None:
    masks = (batch.replaceable_mask, batch.loss_mask, batch.replaced_mask)
    replaceable, learned, drawn = (mask.numpy() for mask in masks)
    kinds = np.where(learned, np.where(replaceable, "replaceable", "target"), "prompt")
    kinds = np.where(drawn, np.where(learned, "drawn", "answer"), kinds)
    _print_legend(console, set(kinds[batch.sample_ids.numpy() >= 0].tolist()))
    for row in range(len(batch.context_ids)):
        for sample_id in dict.fromkeys(batch.sample_ids[row][batch.sample_ids[row] >= 0].tolist()):
            of_sample = batch.sample_ids[row] == sample_id
            console.rule(f"row {row + 1}, sample {sample_id}, {int(of_sample.sum())} tokens", align="left")
            context, target = (ids[row][of_sample].tolist() for ids in (batch.context_ids, batch.target_ids))
            tokens = zip(kinds[row][of_sample.numpy()], context, target, strict=True)
            console.print(_marked(list(tokens), tokenizer, console.is_terminal), soft_wrap=True)


def _print_legend(console: Console, shown: set[str]) -> None:
    legend = Text()
    for kind, (style, meaning) in _KINDS.items():
        if kind in shown:
            legend.append(kind, style=style).append(f": {meaning}\n")
    if "drawn" in shown and not console.is_terminal:
        legend.append("for: the tokens of the reference that were replaced\n")
    console.print(legend)


def _marked(tokens: list[tuple[str, int, int]], tokenizer: PreTrainedTokenizerBase, in_color: bool) -> Text:
    """Return the text of `(kind, context id, target id)`s: each run of a kind in color, or after the kind's name."""
    text = Text()
    for kind, run in groupby(tokens, key=lambda token: token[0]):
        _, context, target = zip(*run, strict=True)
        text.append("" if in_color else f"[{kind}]").append(tokenizer.decode(context), style=_KINDS[kind][0])
        if kind == "drawn":
            text.append("" if in_color else "[for]").append(tokenizer.decode(target), style="dim strike")
    return text
