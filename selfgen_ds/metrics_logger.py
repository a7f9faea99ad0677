"""The metrics of a run: `metrics.jsonl`, the DeepSpeed JSON's monitors, the progress bar, and a warning about draws."""

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

from selfgen_ds.files import naming, write_atomically

log = logging.getLogger("selfgen_ds")

_WATCHED_STEPS = 50
_LEAST_DIFFERING = 0.01  # share of the drawn tokens


class MetricsLogger:
    """Writes the metrics of every optimizer step. Every rank may call the methods; rank 0 writes.

    Args:
        path: Path of `metrics.jsonl`. Lines after `step`, from a run that was killed after its last checkpoint, are
            removed.
        monitor: DeepSpeed's monitor, which passes the metrics on to TensorBoard, CSV files, and others.
        step: Optimizer steps already done.
        total_steps: Optimizer steps of the whole run.
    """

    def __init__(self, path: Path, monitor: MonitorMaster, step: int, total_steps: int) -> None:
        self._path = path
        self._monitor = monitor
        self._writes = dist.get_rank() == 0
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=not self._writes)
        # Differing and drawn tokens of the last steps.
        self._differing: deque[tuple[float, int]] = deque(maxlen=_WATCHED_STEPS)
        if self._writes:
            before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            lines = before.splitlines(keepends=True)
            write_atomically(path, "".join(line for line in lines if _step(line) <= step))

    def write(self, metrics: dict[str, float]) -> None:
        """Write one step.

        Args:
            metrics: The keys of a line of `metrics.jsonl`, with `eval_*` on evaluation steps.
        """
        if not self._writes:
            return
        step = int(metrics["step"])
        with naming("a monitor of the DeepSpeed JSON"):
            self._monitor.write_events([(name, value, step) for name, value in metrics.items() if name != "step"])
        with naming(self._path), open(self._path, "a", encoding="utf-8") as file:
            # JSON has no NaN.
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            file.write(json.dumps(finite) + "\n")
        shown = [f"loss {metrics['loss']:.3f}", f"{metrics['tokens_per_second']:.0f} tokens/s"]
        if metrics["drawn_tokens"]:
            shown[1:1] = [f"p {metrics['replace_probability']:.2f}", f"differing {metrics['differing_share']:.1%}"]
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update(step - self._bar.n)
        scores = [f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("eval_")]
        if scores:
            log.info("step %d: %s", step, ", ".join(scores))
        self._check_draws(step, metrics)

    def sync(self) -> None:
        """Force the lines to the disk, so that no checkpoint is newer than the metrics of its steps."""
        if self._writes:
            with naming(self._path), open(self._path, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def _check_draws(self, step: int, metrics: dict[str, float]) -> None:
        """Warn if the drawn tokens hardly differ from the reference, because the run is then little else than sft."""
        drawn = int(metrics["drawn_tokens"])
        if not drawn:
            return
        self._differing.append((metrics["differing_share"] * drawn, drawn))
        share = sum(differing for differing, _ in self._differing) / sum(drawn for _, drawn in self._differing)
        if len(self._differing) == _WATCHED_STEPS and share < _LEAST_DIFFERING:
            self._differing.clear()  # so that the next warning comes after as many steps at the earliest
            log.warning(
                "step %d: only %.2f %% of the tokens drawn in the last %d steps differed from the reference: this is "
                "sft in all but name; raise selfgen.temperature to draw other tokens",
                step,
                100 * share,
                _WATCHED_STEPS,
            )


def _step(line: str) -> int | float:
    """Return the step of a line; infinity for a damaged line, such as one that a killed run did not finish."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")
