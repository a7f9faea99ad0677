"""`selfgen-ds evaluate`: a model folder on a data set -> `evaluation.json`, `predictions.jsonl`, `evaluation.png`."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from transformers import set_seed

from selfgen_ds.config import EvaluateOptions, InputError, ModelConfig, model_folder_problems
from selfgen_ds.data.rows import read_rows
from selfgen_ds.data.samples import Samples, tokenize
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.engine import launch, probe
from selfgen_ds.engine.model import build_model, model_config, most_positions
from selfgen_ds.engine.policy import EnginePolicy
from selfgen_ds.evaluation.scores import (
    METRICS,
    RECOVERY_METRICS,
    SAMPLED_METRICS,
    SampleScore,
    aggregate,
    curves,
    evaluate,
)
from selfgen_ds.files import make_folder, write_atomically


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
    if options.sample_temperature < 0:
        raise InputError(f"--sample_temperature: expected 0 or more, got {options.sample_temperature}")
    if found := model_folder_problems("--model", options.model):
        raise InputError(found[0])
    make_folder(Path(options.output_dir), "--output_dir")
    if not options.data.startswith("builtin:") and not Path(options.data).is_file():
        raise InputError(f"--data: expected an existing file, or builtin:<task>, got {options.data!r}")
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
    form = probe.check(source, config, packing=False)
    rows = islice(
        read_rows(options.data, "test", options.prompt_column, options.completion_column), options.max_samples
    )
    samples = tokenize(rows, tokenizer, options.data, max_length, max_refused_share=1.0)
    if launch.world_size() > 1:
        launch.init_process_group()
    model = build_model(source, config, form).to(launch.device()).eval()
    set_seed(options.seed + launch.rank())
    policy = EnginePolicy(model, model, end_token=tokenizer.eos_token_id)
    scores = evaluate(policy, samples, tokenizer, options.batch_size, options.sample_temperature)
    if launch.rank() == 0:
        write(scores, options, samples)
    if dist.is_initialized():
        dist.barrier()


def write(scores: list[SampleScore], options: EvaluateOptions, samples: Samples) -> None:
    """`evaluation.json`, `predictions.jsonl` and `evaluation.png` in the output folder."""
    folder = Path(options.output_dir)
    lines = [json.dumps(asdict(s) | {"metrics": s.metrics()}, ensure_ascii=False) for s in scores]
    write_atomically(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    metrics, positions = aggregate(scores), curves(scores)
    result = {
        "model": options.model,
        "data": options.data,
        "n": len(scores),
        "truncated": samples.truncated,
        "refused": samples.refused,
        "settings": asdict(options),
        "metrics": metrics,
        "curves": positions,
        "torch": torch.__version__,
    }
    write_atomically(folder / "evaluation.json", json.dumps(result, indent=1))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
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
    axes.set_title(f"{options.model} on {options.data}", fontsize=9)
    axes.legend()
    figure.savefig(folder / "evaluation.png", dpi=150)
    plt.close(figure)
    described = METRICS | RECOVERY_METRICS | SAMPLED_METRICS
    print("\n".join(f"{name:26}{value:8.3f}  {described[name]}" for name, value in metrics.items()))
    print(f"{len(scores)} rows, {samples.truncated} with a truncated response, {samples.refused} left out for length")
    print(f"written to {folder}/evaluation.json, predictions.jsonl and evaluation.png")
