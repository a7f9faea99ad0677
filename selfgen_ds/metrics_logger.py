"""What a run tells: `metrics.jsonl`, the JSON's monitors, the progress bar, warnings."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from pathlib import Path

import torch.distributed as dist
from deepspeed.monitor.monitor import MonitorMaster
from tqdm import tqdm

from selfgen_ds.files import write_atomically

log = logging.getLogger("selfgen_ds")

_WINDOW, _LEAST_DIFFERING = 50, 0.01


class MetricsLogger:
    """One line an optimizer step. Every rank may call it; rank 0 writes.

    Args:
        path: `metrics.jsonl`.
        step: Steps done. Lines past it, of a run that was killed after its last checkpoint, are removed.
    """

    def __init__(self, path: Path, monitor: MonitorMaster, step: int, total_steps: int) -> None:
        self._path = path
        self._monitor = monitor
        self._writes = dist.get_rank() == 0
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=not self._writes)
        self._differing: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        if self._writes:
            lines = (
                path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
            )
            write_atomically(path, "".join(line for line in lines if _step(line) <= step))

    def write(self, metrics: dict[str, float]) -> None:
        """Record one step: the keys of `metrics.jsonl`, `eval_*` among them on evaluation steps."""
        if not self._writes:
            return
        step = int(metrics["step"])
        self._monitor.write_events([(name, value, step) for name, value in metrics.items() if name != "step"])
        with open(self._path, "a", encoding="utf-8") as file:
            # JSON has no NaN
            file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in metrics.items()}) + "\n")
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, p {metrics['replace_probability']:.2f}, "
            f"differing {metrics['differing_share']:.1%}, {metrics['tokens_per_second']:.0f} tokens/s",
            refresh=False,
        )
        self._bar.update(step - self._bar.n)
        evaluated = [f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("eval_")]
        if evaluated:
            log.info("step %d: %s", step, ", ".join(evaluated))
        self._watch_draws(step, metrics)

    def sync(self) -> None:
        """To the disk, before a checkpoint says that its steps are done."""
        if self._writes:
            with open(self._path, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        self._bar.close()

    def _watch_draws(self, step: int, metrics: dict[str, float]) -> None:
        """A model that draws the reference is trained by teacher forcing, whatever the method is called."""
        if not metrics["drawn_tokens"]:
            return
        self._differing.append((metrics["differing_share"] * metrics["drawn_tokens"], int(metrics["drawn_tokens"])))
        share = sum(d for d, _ in self._differing) / sum(n for _, n in self._differing)
        if len(self._differing) == _WINDOW and share < _LEAST_DIFFERING:
            self._differing.clear()  # and say so again only after as many steps
            log.warning(
                "step %d: over the last %d steps only %.2f %% of the drawn tokens differed from the reference: this is "
                "sft in all but name; a higher selfgen.temperature draws other tokens",
                step,
                _WINDOW,
                100 * share,
            )


def _step(line: str) -> int | float:
    """The step of a line; infinite for one that is damaged, such as by the run's end."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")
