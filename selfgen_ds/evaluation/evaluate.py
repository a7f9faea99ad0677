"""`selfgen-ds evaluate`: a model folder on a data set -> `evaluation.json`, `predictions.jsonl`, `evaluation.png`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from selfgen_ds.config import (
    EvaluateOptions,
    ModelConfig,
    model_folder_problems,
    source_problems,
)
from selfgen_ds.data.correction import Correction, correction
from selfgen_ds.data.rows import Columns
from selfgen_ds.data.samples import Format, Sample, Samples, end_tokens, load, take
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.evaluation.metrics import SampleScore, aggregate, curves, descriptions
from selfgen_ds.evaluation.plots import plot_evaluation
from selfgen_ds.evaluation.scores import corrected_length, evaluate
from selfgen_ds.files import make_folder, write_atomically
from selfgen_ds.model import probe
from selfgen_ds.model.loading import build_model, model_config, most_positions
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.ranks import process_group


def run(options: EvaluateOptions) -> None:
    """Evaluate a model folder and write the results.

    Collective under a launcher: every rank must call this, because the ranks share the rows; each holds the model.

    Raises:
        InputError: The options, the data or the model are not as expected.
    """
    for setting in ("max_samples", "batch_size"):
        if getattr(options, setting) is not None and getattr(options, setting) < 1:
            raise InputError(f"--{setting}: expected 1 or more, got {getattr(options, setting)}")
    if not 0 <= options.seed < 2**31:
        raise InputError(f"--seed: expected 0 to {2**31 - 1}, got {options.seed}")
    if options.correction_rounds < 0:
        raise InputError(f"--correction_rounds: expected 0 or more, got {options.correction_rounds}")
    if options.cue is not None and not options.correction_rounds:
        raise InputError("--cue: expected --correction_rounds as well")
    if options.sample_temperature < 0:
        raise InputError(f"--sample_temperature: expected 0 or more, got {options.sample_temperature}")
    if found := model_folder_problems("--model", options.model):
        raise InputError(found[0])
    make_folder(Path(options.output_dir), "--output_dir")
    if found := source_problems("--data", options.data):
        raise InputError(found[0])
    source = ModelConfig(
        name_or_path=options.model, dtype=options.dtype, attn_implementation=options.attn_implementation
    )
    tokenizer = load_tokenizer(source)
    config = model_config(source, tokenizer)
    positions = most_positions(config)
    logits_form = probe.check(source, config, packing=False, training=False)
    samples = _load_samples(options, tokenizer, positions)
    chosen = take(samples, options.max_samples)
    asked = correction(samples, tokenizer, options.cue, "--cue") if options.correction_rounds else None
    if asked is not None:
        _check_corrections(chosen, asked, positions)
    if process_group.world_size() > 1:
        process_group.init_process_group()
    model = build_model(source, config, logits_form).to(process_group.device()).eval()
    policy = EnginePolicy(
        model, model, end_tokens=end_tokens(samples, tokenizer), generation_batch_size=options.batch_size
    )
    scores = evaluate(
        policy,
        chosen,
        tokenizer,
        options.batch_size,
        sample_temperature=options.sample_temperature,
        seed=options.seed,
        correction=asked,
        correction_rounds=options.correction_rounds,
    )
    if process_group.rank() == 0:
        write(scores, options, samples)
    if dist.is_initialized():
        dist.barrier()


def _load_samples(options: EvaluateOptions, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> list[Samples]:
    """Load the rows to evaluate on.

    Args:
        positions: Positions of the model; None if the model sets no limit.

    Raises:
        InputError: `--max_length` does not fit the model, or the rows are not as expected.
    """
    max_length = options.max_length or positions
    if max_length is None:
        raise InputError("--max_length: expected a length, because the model sets no limit; got none")
    if not 2 <= max_length <= (positions or max_length):
        raise InputError(f"--max_length: expected 2 to the model's {positions} positions, got {max_length}")
    columns = Columns(
        prompt=options.prompt_column, completion=options.completion_column, messages=options.messages_column
    )
    form = Format(columns=columns, max_length=max_length, limit=options.max_samples)
    return load(options.data, "test", tokenizer, form)


def _check_corrections(samples: list[Sample], asked: Correction, positions: int | None) -> None:
    """Check that the model has positions for prompt, answer, cue and corrected answer.

    Raises:
        InputError: The model has fewer positions than the longest row may need.
    """
    needed = corrected_length(samples, asked)
    if positions is not None and needed > positions:
        raise InputError(
            f"--correction_rounds: the longest prompt, two answers as long as the longest response, and the cue come "
            f"to {needed} tokens, but the model has {positions} positions; a smaller --max_length cuts responses and "
            f"leaves out rows"
        )


def write(scores: list[SampleScore], options: EvaluateOptions, samples: list[Samples]) -> None:
    """Write `evaluation.json`, `predictions.jsonl` and `evaluation.png` to the output folder, and print the metrics."""
    folder = Path(options.output_dir)
    lines = [json.dumps(asdict(s) | {"metrics": s.metrics()}, ensure_ascii=False) for s in scores]
    write_atomically(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    metrics, positions = aggregate(scores), curves(scores)
    settings = asdict(options)
    truncated, refused = sum(s.truncated for s in samples), sum(s.refused for s in samples)
    result = {
        "model": options.model,
        "data": settings["data"],
        "n": len(scores),
        "truncated": truncated,
        "refused": refused,
        "settings": settings,
        "metrics": metrics,
        "curves": positions,
        "torch": torch.__version__,
    }
    write_atomically(folder / "evaluation.json", json.dumps(result, indent=1))
    title = f"{options.model} on {', '.join(s.name for s in samples)}"
    plot_evaluation(folder / "evaluation.png", title, positions, metrics, options.correction_rounds)
    meanings = descriptions(options.correction_rounds)
    print("\n".join(f"{name:26}{value:8.3f}  {meanings[name]}" for name, value in metrics.items()))
    print(f"{len(scores)} rows; {truncated} responses truncated, {refused} prompts left out because of their length")
    print(f"written to {folder}/evaluation.json, predictions.jsonl and evaluation.png")
