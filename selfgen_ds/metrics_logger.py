"""The metrics of a run: `metrics.jsonl`, the DeepSpeed JSON's monitors, the progress bar, and a warning about draws."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from deepspeed.monitor.monitor import MonitorMaster
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from selfgen_ds.evaluation.metrics import SampleScore
from selfgen_ds.files import naming, write_atomically
from selfgen_ds.progress import bar

log = logging.getLogger("selfgen_ds")

_SHOWN = 240  # characters of a text in the log
_WATCHED_STEPS = 50
_LEAST_DIFFERING = 0.01  # share of the drawn tokens


_GROUPS = {
    "speed": {"tokens_per_second", "step_time_s", "pass_time_s", "round_time_s", "peak_memory_bytes"},
    "selfgen": {"replace_probability", "drawn_tokens", "differing_share", "passes", "groups", "round"}
    | {"round_differing_share"},
}
"""Group of metrics in TensorBoard -> its metrics. All others are in the group `train`."""


class MetricsLogger:
    """Writes the metrics of every optimizer step. Every rank may call the methods; rank 0 writes.

    Args:
        path: Path of `metrics.jsonl`. Lines after `step`, from a run that was killed after its last checkpoint, are
            removed.
        monitor: DeepSpeed's monitor, which passes the metrics on to TensorBoard, CSV files, and others.
        step: Optimizer steps already done.
        total_steps: Optimizer steps of the whole run.
        watched: Name of a metric whose values are kept.
    """

    def __init__(self, path: Path, monitor: MonitorMaster, step: int, total_steps: int, watched: str) -> None:
        self._path = path
        self._monitor = monitor
        self._writes = dist.get_rank() == 0
        self._bar = bar("train", "step", total=total_steps, initial=step, disable=not self._writes)
        # Differing and drawn tokens of the last steps.
        self._differing: deque[tuple[float, int]] = deque(maxlen=_WATCHED_STEPS)
        self.watched: dict[int, float] = {}
        """Step -> value of the watched metric, from the run's first step on; on rank 0."""
        self._watched_name = watched
        self._history: list[dict[str, float | None]] = []  # the lines of earlier starts, on rank 0
        if self._writes:
            before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            lines = before.splitlines(keepends=True)
            kept = [line for line in lines if _step(line) <= step]
            write_atomically(path, "".join(kept))
            self._history = [json.loads(line) for line in kept]
            self._watch(*self._history)
            if step and monitor.tb_monitor is not None and monitor.tb_monitor.enabled:
                _purge_after(step, monitor.tb_monitor.summary_writer)

    def write(self, metrics: dict[str, float]) -> None:
        """Write one step.

        Args:
            metrics: The keys of a line of `metrics.jsonl`, with `eval_*` on evaluation steps.
        """
        if not self._writes:
            return
        step = int(metrics["step"])
        with naming("a monitor of the DeepSpeed JSON"):
            self._monitor.write_events([(_tag(name), value, step) for name, value in metrics.items() if name != "step"])
        with naming(self._path), open(self._path, "a", encoding="utf-8") as file:
            # JSON has no NaN.
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            file.write(json.dumps(finite) + "\n")
        shown = [f"loss {metrics['loss']:.3f}", f"rate {metrics['learning_rate']:.1e}"]
        shown.append(f"grad norm {metrics['grad_norm']:.2g}")
        if metrics["drawn_tokens"]:
            shown += [f"p {metrics['replace_probability']:.2f}", f"differing {metrics['differing_share']:.1%}"]
        shown.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update(step - self._bar.n)
        scores = [f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("eval_")]
        if scores:
            log.info("step %d: %s", step, ", ".join(scores))
        self._watch(metrics)
        self._check_draws(step, metrics)

    def take_history(self, names: tuple[str, ...]) -> list[dict[str, float | None]]:
        """Return some metrics of the steps of earlier starts, on rank 0, and forget them."""
        history, self._history = self._history, []
        return [{name: line.get(name) for name in names} for line in history]

    def warn(self, step: int, text: str) -> None:
        """Log a warning about the training, and write it to TensorBoard as text."""
        log.warning("step %d: %s", step, text)
        board = self._monitor.tb_monitor if self._writes else None
        if board is not None and board.enabled:
            board.summary_writer.add_text("train/warning", text, step)

    def show_answers(self, step: int, scores: list[SampleScore]) -> None:
        """Log the model's answers to some evaluation rows, and write them to TensorBoard as text."""
        if not self._writes:
            return
        board = self._monitor.tb_monitor
        for score in scores:
            told = [("prompt", score.prompt[-_SHOWN:]), ("answer", score.answer), ("reference", score.reference)]
            log.info("step %d, %s", step, "; ".join(f"{name}: {_one_line(text)}" for name, text in told))
            if board is not None and board.enabled:
                text = "\n\n".join(f"**{name}**\n\n    " + text.replace("\n", "\n    ") for name, text in told)
                board.summary_writer.add_text(f"eval/answer to row {score.sample_id}", text, step)

    def _watch(self, *metrics: Mapping[str, float | None]) -> None:
        """Keep the values of the watched metric."""
        for line in metrics:
            if self._watched_name in line:
                value = line[self._watched_name]
                self.watched[int(line["step"] or 0)] = math.nan if value is None else value

    def sync(self) -> None:
        """Force the lines to the disk, so that no checkpoint is newer than the metrics of its steps."""
        if self._writes:
            with naming(self._path), open(self._path, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def finish(self) -> None:
        """End the run in Weights & Biases, whose last lines are written only then. This may wait for the network."""
        if self._writes and self._monitor.wandb_monitor is not None and self._monitor.wandb_monitor.enabled:
            import wandb  # an optional dependency

            with naming("Weights & Biases"):
                wandb.finish()

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


def _one_line(text: str) -> str:
    """Return a text as a string literal, without its middle if it is long."""
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}")


def _tag(name: str) -> str:
    """Return the name of a metric for monitors, in a group: `train/`, `eval/`, `speed/` or `selfgen/`."""
    if name.startswith("eval_"):
        return f"eval/{name.removeprefix('eval_')}"
    return f"{next((group for group, names in _GROUPS.items() if name in names), 'train')}/{name}"


def _purge_after(step: int, writer: SummaryWriter) -> None:
    """Let TensorBoard drop what an earlier start of the run wrote after a step, as `SummaryWriter(purge_step=...)`."""
    for event in (
        Event(step=step + 1, file_version="brain.Event:2"),
        Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)),
    ):
        writer._get_file_writer().add_event(event)


def _step(line: str) -> int | float:
    """Return the step of a line; infinity for a damaged line, such as one that a killed run did not finish."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")
