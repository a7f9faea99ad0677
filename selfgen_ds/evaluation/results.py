"""The results of an evaluation: its three files, and what the terminal shows."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from selfgen_ds.config import EvaluateOptions
from selfgen_ds.data.samples import Samples
from selfgen_ds.evaluation import predictions
from selfgen_ds.evaluation.curves import Curves, accuracy_by_errors
from selfgen_ds.evaluation.metrics import SampleScore, aggregate, kind_and_metric, meaning
from selfgen_ds.evaluation.plots import plot_evaluation
from selfgen_ds.files import as_json, write_atomically

log = logging.getLogger("selfgen_ds")

_FILES = ("evaluation.json", predictions.FILE, "evaluation.png")


@dataclass(frozen=True, kw_only=True)
class About:
    """What was evaluated."""

    samples: list[Samples]
    """The sources of the rows."""
    dtype: str
    """Type of the model's weights."""
    key: str
    """Checksum of what the scores depend on."""


def holds(folder: str, key: str) -> bool:
    """Return whether a folder holds the whole evaluation with a key."""
    evaluation = _read(folder)
    return evaluation.get("key") == key and _checksum(folder) == evaluation.get("predictions")


def read(folder: str) -> list[SampleScore]:
    """Return the scores of an evaluation that was made before."""
    return list(predictions.read(Path(folder) / predictions.FILE))


def put_aside(folder: str) -> None:
    """Rename the files of the evaluation that a folder holds."""
    if (Path(folder) / _FILES[0]).exists():
        log.warning("%s holds another evaluation, which is kept as evaluation.json.old and so on", folder)
        for path in (Path(folder) / name for name in _FILES):
            if path.exists():
                path.replace(f"{path}.old")


def _read(folder: str) -> dict[str, Any]:
    """Return what a folder says of its evaluation; nothing if it holds none."""
    try:
        evaluation = json.loads((Path(folder) / _FILES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return evaluation if isinstance(evaluation, dict) else {}


def _checksum(folder: str) -> str | None:
    path = Path(folder) / predictions.FILE
    return predictions.checksum(path) if path.is_file() else None


def write(scores: list[SampleScore], options: EvaluateOptions, about: About, judged: dict[str, Any]) -> None:
    """Write the files of an evaluation to the output folder.

    Args:
        judged: What a judge has said, if one was asked.
    """
    folder, samples = Path(options.output_dir), about.samples
    predictions.write(folder / predictions.FILE, scores)
    metrics, settings = aggregate(scores), asdict(options)
    result = {
        "model": options.model,
        "data": settings["data"],
        "n": len(scores),
        "truncated": sum(source.truncated for source in samples),
        "refused": sum(source.refused for source in samples),
        "unfinished": sum(score.unfinished for score in scores),
        "dtype": about.dtype,
        "settings": settings,
        "metrics": metrics,
        "curves": {**Curves(scores).to_json(), "accuracy_by_errors": accuracy_by_errors(scores)},
        "judged": judged,
        "predictions": predictions.checksum(folder / predictions.FILE),
        "key": about.key,
        "torch": torch.__version__,
    }
    write_atomically(folder / "evaluation.json", as_json(result))
    title = f"{options.model} on {', '.join(s.name for s in samples)}, {len(scores)} rows, 95 % intervals"
    plot_evaluation(folder / "evaluation.png", title, scores, metrics)


def summary(scores: list[SampleScore], folder: str, samples: list[Samples]) -> str:
    """Return what the terminal shows of an evaluation.

    Args:
        folder: Where the files are.
    """
    lines = [_table(aggregate(scores))]
    if judged := _read(folder).get("judged"):
        rate = judged["length_controlled_win_rate"]
        interval = f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
        lines.append(f"win rate at equal length, by {judged['judge']} against {judged['against']}: {interval}")
        doubts = f"{judged['unclear']:.1%} of the verdicts were unclear"
        lines.append(f"{doubts}, {judged['by_place']:.1%} of the pairs were decided by the answers' order alone")
    truncated, refused = sum(s.truncated for s in samples), sum(s.refused for s in samples)
    lines.append(f"{len(scores)} rows; {truncated} responses truncated, {refused} rows left out")
    if unfinished := sum(score.unfinished for score in scores):
        advice = "--max_new_tokens allows longer ones"
        lines.append(f"{unfinished} greedy answers were cut before the model ended them; {advice}")
    return "\n".join([*lines, f"written to {folder}/evaluation.json, predictions.jsonl and evaluation.png"])


def _table(metrics: dict[str, float]) -> str:
    """Return the metrics as text: those of the greedy answers with their meaning, then a column per other kind."""
    kinds = dict.fromkeys(kind for kind, _ in map(kind_and_metric, metrics) if kind)
    width = max(map(len, metrics)) + 1
    lines = [f"{n:{width}}{value:8.3f}  {meaning(n)}" for n, value in metrics.items() if not kind_and_metric(n)[0]]
    names = dict.fromkeys(metric for kind, metric in map(kind_and_metric, metrics) if kind)
    if kinds:
        lines += ["", " " * width + "  ".join(f"{kind:>14}" for kind in kinds)]
    for name in names:
        cells = [metrics.get(f"{kind}_{name}") for kind in kinds]
        lines.append(f"{name:{width}}" + "  ".join(" " * 14 if cell is None else f"{cell:14.3f}" for cell in cells))
    return "\n".join(lines)
