"""`selfgen-ds evaluate`: a model folder on a data set -> `evaluation.json`, `predictions.jsonl`, `evaluation.png`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from matplotlib.axes import Axes

from selfgen_ds.config import (
    EvaluateOptions,
    ModelConfig,
    model_folder_problems,
    source_problems,
)
from selfgen_ds.data.correction import correction
from selfgen_ds.data.rows import Columns
from selfgen_ds.data.samples import Format, Samples, end_tokens, load, take
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.evaluation.scores import (
    CORRECTION_METRICS,
    METRICS,
    RECOVERY_METRICS,
    SAMPLED_METRICS,
    SampleScore,
    aggregate,
    corrected,
    corrected_length,
    curves,
    evaluate,
)
from selfgen_ds.files import make_folder, write_atomically
from selfgen_ds.model import probe
from selfgen_ds.model.loading import build_model, model_config, most_positions
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.ranks import process_group


def run(options: EvaluateOptions) -> None:
    """Evaluate as the command line says. Collective under a launcher.

    Raises:
        InputError: Bad options, data or model.
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
    max_length = options.max_length or positions
    if max_length is None:
        raise InputError("--max_length: expected a length, for the model sets no limit")
    if not 2 <= max_length <= (positions or max_length):
        raise InputError(f"--max_length: expected 2 to the model's {positions} positions, got {max_length}")
    logits_form = probe.check(source, config, packing=False, training=False)
    columns = Columns(
        prompt=options.prompt_column, completion=options.completion_column, messages=options.messages_column
    )
    form = Format(columns=columns, max_length=max_length, limit=options.max_samples)
    samples = load(options.data, "test", tokenizer, form)
    chosen = take(samples, options.max_samples)
    asked = correction(samples, tokenizer, options.cue, "--cue") if options.correction_rounds else None
    if asked is not None and positions is not None and (needed := corrected_length(chosen, asked)) > positions:
        raise InputError(
            f"--correction_rounds: the longest prompt, two answers as long as the longest response, and the cue come "
            f"to {needed} tokens, the model has {positions} positions; a smaller --max_length leaves out or cuts rows"
        )
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


def write(scores: list[SampleScore], options: EvaluateOptions, samples: list[Samples]) -> None:
    """`evaluation.json`, `predictions.jsonl` and `evaluation.png` in the output folder."""
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
    rounds = options.correction_rounds
    figure, panels = plt.subplots(
        1, 1 + bool(rounds), figsize=(7 + 5 * bool(rounds), 4), layout="constrained", squeeze=False
    )
    axes = panels[0, 0]
    for (name, values), line in zip(positions.items(), ("-", "--", ":"), strict=False):
        axes.plot(
            range(1, len(values) + 1),
            values,
            marker="." if len(values) < 60 else "",
            linestyle=line,
            label=name.replace("_", " "),
        )
    axes.set(
        xlabel="position in the answer (recovery: after the forced error)",
        ylabel="accuracy",
        ylim=(-0.02, 1.02),
    )
    axes.set_title(f"{options.model} on {', '.join(s.name for s in samples)}", fontsize=9)
    axes.legend()
    if rounds:
        _plot_corrections(panels[0, 1], metrics, rounds)
    figure.savefig(folder / "evaluation.png", dpi=150)
    plt.close(figure)
    described = METRICS | RECOVERY_METRICS | SAMPLED_METRICS
    for number in range(1, rounds + 1):
        described |= {name: CORRECTION_METRICS[what] for what, name in corrected(number).items()}
    print("\n".join(f"{name:26}{value:8.3f}  {described[name]}" for name, value in metrics.items()))
    print(f"{len(scores)} rows, {truncated} with a truncated response, {refused} left out for length")
    print(f"written to {folder}/evaluation.json, predictions.jsonl and evaluation.png")


def _plot_corrections(axes: Axes, metrics: dict[str, float], rounds: int) -> None:
    """Exact match and the rates of change over the rounds of correction."""
    numbers = range(1, rounds + 1)
    for what, line in zip(CORRECTION_METRICS, ("-", "--", "--", ":"), strict=True):
        first = [metrics["exact_match"]] if what == "exact_match" else []
        values = [*first, *(metrics[corrected(number)[what]] for number in numbers)]
        axes.plot(range(rounds + 1)[-len(values) :], values, marker="o", linestyle=line, label=what.replace("_", " "))
    axes.set(xlabel="corrections", ylabel="share of rows", ylim=(-0.02, 1.02), xticks=range(rounds + 1))
    axes.legend()
