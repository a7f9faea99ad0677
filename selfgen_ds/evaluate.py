"""`selfgen-ds evaluate`: a model folder on a data set -> `evaluation.json`, `predictions.jsonl`, `evaluation.png`."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from selfgen_ds.chat.template import asks_for_date
from selfgen_ds.config import EvaluateOptions, ModelConfig
from selfgen_ds.data.correction import Correction, correction
from selfgen_ds.data.encoding import Format
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.row_checks import Columns
from selfgen_ds.data.samples import Samples, end_tokens, first_rows, load
from selfgen_ds.data.tokenizer import generation_ends, load_tokenizer
from selfgen_ds.errors import Problems
from selfgen_ds.evaluation.metrics import SampleScore, aggregate, binned_curves, curves, descriptions
from selfgen_ds.evaluation.plots import plot_evaluation
from selfgen_ds.evaluation.recovery import forced_errors
from selfgen_ds.evaluation.scores import EvaluationRequests, answered_length, corrected_length, evaluate
from selfgen_ds.files import make_folder, write_atomically
from selfgen_ds.model import probe
from selfgen_ds.model.loading import build_model, model_config, most_positions
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.ranks import process_group
from selfgen_ds.validation.inputs import check_rows
from selfgen_ds.validation.options import (
    check_answered_length,
    check_corrected_length,
    check_evaluate,
    check_evaluated_length,
    naming_the_options,
)

log = logging.getLogger("selfgen_ds")


def run(options: EvaluateOptions) -> None:
    """Evaluate a model folder and write the results.

    Collective under a launcher: every rank must call this, because the ranks share the rows; each holds the model.

    Raises:
        InputError: The options, the data, or the model are not as expected.
    """
    problems = Problems()
    check_evaluate(problems, options)
    problems.raise_all()
    make_folder(Path(options.output_dir), "--output_dir")
    source = ModelConfig(
        name_or_path=options.model,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        chat_template=options.chat_template,
        trust_remote_code=options.trust_remote_code,
    )
    with naming_the_options():
        tokenizer = load_tokenizer(source)
        config = model_config(source, tokenizer)
    positions = most_positions(config)
    length = options.max_length or positions
    check_evaluated_length(problems, length, positions)
    with problems.collect(), naming_the_options():
        traits = probe.check(source, config, packing=False, training=False)
    problems.raise_all()
    assert length is not None
    samples = _load_rows(options, tokenizer, length)
    chosen = first_rows(samples, options.max_samples)
    asked = correction(samples, tokenizer, options.cue, "--cue") if options.correction_rounds else None
    _check_answers(options, chosen, asked, positions)
    if process_group.world_size() > 1:
        process_group.init_process_group()
    with naming_the_options():
        model = build_model(source, config, traits.logit_transform).to(process_group.device()).eval()
    policy = EnginePolicy(
        model,
        end_tokens=end_tokens(samples, tokenizer),
        generation_batch_size=options.batch_size,
        sharing=traits.sharing,
    )
    requests = EvaluationRequests(
        max_new_tokens=options.max_new_tokens,
        forced_errors=forced_errors(samples, tokenizer),
        sample_temperature=options.sample_temperature,
        seed=options.seed,
        correction=asked,
        correction_rounds=options.correction_rounds,
    )
    scores = evaluate(policy, chosen, tokenizer, options.batch_size, requests)
    if process_group.rank() == 0:
        _write(scores, options, samples)
    if dist.is_initialized():
        dist.barrier()


def _check_answers(
    options: EvaluateOptions, samples: list[TrainingRow], asked: Correction | None, positions: int | None
) -> None:
    """Check that the model has positions for the longest answers that are asked for.

    Raises:
        InputError: It has not.
    """
    problems = Problems()
    if positions is not None and options.max_new_tokens is not None:
        check_answered_length(problems, answered_length(samples, options.max_new_tokens), positions)
    if positions is not None and asked is not None:
        check_corrected_length(problems, corrected_length(samples, asked, options.max_new_tokens), positions)
    problems.raise_all()


def _load_rows(options: EvaluateOptions, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Samples]:
    """Load the rows, of which those that are too long may be left out.

    Raises:
        InputError: A source cannot be read, or more rows cannot be used, for another reason than their length, than the
            options allow.
    """
    form = Format(
        columns=Columns(
            prompt=options.prompt_column, completion=options.completion_column, messages=options.messages_column
        ),
        as_chat=options.as_chat,
        prompt_template=options.prompt_template,
        date=(options.date or str(date.today())) if asks_for_date(tokenizer) else None,
        end_ids=generation_ends(ModelConfig(name_or_path=options.model)),
        max_length=length,
        limit=options.max_samples,
    )
    samples = load(options.data, "test", tokenizer, form)
    problems = Problems()
    check_rows(problems, samples, options.max_refused_share)
    problems.raise_all()
    return samples


def _write(scores: list[SampleScore], options: EvaluateOptions, samples: list[Samples]) -> None:
    """Write `evaluation.json`, `predictions.jsonl` and `evaluation.png` to the output folder, and print the metrics."""
    folder = Path(options.output_dir)
    lines = [json.dumps(asdict(s) | {"metrics": s.metrics()}, ensure_ascii=False) for s in scores]
    write_atomically(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    metrics, positions = aggregate(scores), curves(scores)
    settings = asdict(options)
    truncated, refused = sum(s.truncated for s in samples), sum(s.refused for s in samples)
    unfinished = sum(score.unfinished for score in scores)
    result = {
        "model": options.model,
        "data": settings["data"],
        "n": len(scores),
        "truncated": truncated,
        "refused": refused,
        "unfinished": unfinished,
        "settings": settings,
        "metrics": metrics,
        "curves": positions,
        "torch": torch.__version__,
    }
    if (folder / "evaluation.json").exists():
        log.info("replacing the evaluation that %s holds", folder)
    write_atomically(folder / "evaluation.json", json.dumps(result, indent=1))
    title = f"{options.model} on {', '.join(s.name for s in samples)}, {len(scores)} rows, 95 % intervals"
    plot_evaluation(folder / "evaluation.png", title, binned_curves(scores), metrics, options.correction_rounds)
    meanings = descriptions(options.correction_rounds)
    print("\n".join(f"{name:26}{value:8.3f}  {meanings[name]}" for name, value in metrics.items()))
    print(f"{len(scores)} rows; {truncated} responses truncated, {refused} rows left out")
    if unfinished:
        print(f"{unfinished} greedy answers were cut before the model ended them; --max_new_tokens allows longer ones")
    print(f"written to {folder}/evaluation.json, predictions.jsonl and evaluation.png")
