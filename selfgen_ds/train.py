"""The training loop: recipe -> data -> method -> engine -> metrics."""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from selfgen_ds.checkpoint import checkpoint
from selfgen_ds.checkpoint.export import export_engine
from selfgen_ds.config import Recipe
from selfgen_ds.engine.step import StepResult, train_step
from selfgen_ds.errors import Stopped
from selfgen_ds.evaluation.metrics import aggregate
from selfgen_ds.evaluation.scores import evaluate
from selfgen_ds.metrics_logger import MetricsLogger
from selfgen_ds.ranks.watch import Watch
from selfgen_ds.setup.prepare import Run, prepare

log = logging.getLogger("selfgen_ds")

_COLLECT_EVERY = 100  # steps; left to itself, Python's collector stalls all ranks whenever it runs on one


def train(recipe: Recipe, overrides: set[str]) -> None:
    """Train, evaluate, save and export as the recipe says. Collective.

    Args:
        overrides: Settings that were given on the command line.

    Raises:
        InputError: Bad input or configuration, before the first step.
        Stopped: A signal came before the last step; everything is saved.
        RuntimeError: `train.max_nonfinite_steps` steps in a row had no finite loss or gradient.
    """
    with Watch(recipe.train.stall_seconds) as watch:
        run = prepare(recipe, overrides, watch.poll)
        end = _StepEnd(run, recipe, watch)
        watch.begin(run.engine.module)
        gc.disable()
        if run.resumed is not None and run.resumed.unevaluated is not None:
            end(run.first_step, run.resumed.unevaluated)
        for step in range(run.first_step, run.total_steps):
            round_started = time.perf_counter()
            windows = run.windows if run.rounds is None else run.rounds.windows(step)
            started, forwards = time.perf_counter(), watch.forwards
            get_accelerator().reset_peak_memory_stats()
            window = [batch.to(run.engine.device) for batch in windows.window(step)]
            pass_started = time.perf_counter()
            window = run.method.contexts(window, run.policy, step)
            get_accelerator().synchronize()
            pass_time = time.perf_counter() - pass_started
            result = train_step(run.engine, window, recipe.optim.label_smoothing, recipe.selfgen.drawn_context_weight)
            metrics = _metrics(run, step, result, started - round_started, pass_time, time.perf_counter() - started)
            end(step + 1, metrics, result, watch.forwards - forwards)
            if _due(step + 1, _COLLECT_EVERY):
                gc.collect()
        gc.enable()
        watch.pause()
        end.metrics_logger.close()
        folder = Path(recipe.output_dir) / "model"
        export_engine(run.engine, folder, run.tokenizer, recipe.model.lora)
        log.info("done; the model is in %s", folder)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _metrics(
    run: Run, step: int, result: StepResult, round_time: float, pass_time: float, step_time: float
) -> dict[str, float]:
    """One line of `metrics.jsonl`. A step's time is without that of drawing a round.

    `peak_memory_bytes` is rank 0's; on a CPU its resident set, sampled here.
    """
    router_loss = {} if result.router_loss is None else {"router_loss": result.router_loss}
    probability, round_metrics = run.method.replace_probability(step), {}
    if run.rounds is not None:
        probability = run.rounds.replace_probability
        round_metrics = {"round": run.rounds.number + 1, "round_time_s": round_time}
    return {
        "step": step + 1,
        "epoch": run.windows.epoch(step + 1),
        **round_metrics,
        "loss": result.loss,
        **router_loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "replace_probability": probability,
        "drawn_tokens": result.drawn,
        "differing_share": result.differing / max(1, result.drawn),
        "passes": run.method.passes if result.drawn else 0,
        "groups": run.policy.groups if result.drawn and run.method.passes else 0,
        "tokens_per_second": result.tokens / step_time,
        "step_time_s": step_time,
        "pass_time_s": pass_time,
        "peak_memory_bytes": get_accelerator().max_memory_allocated(),
        "dropped": int(not result.applied),
    }


class _StepEnd:
    """What follows on a step: evaluation, the record, a checkpoint, and the question whether to go on."""

    def __init__(self, run: Run, recipe: Recipe, watch: Watch) -> None:
        self._run, self._recipe, self._watch = run, recipe, watch
        folder = Path(recipe.output_dir)
        self.metrics_logger = MetricsLogger(
            folder / "metrics.jsonl", run.engine.monitor, run.first_step, run.total_steps
        )
        self._checkpoints = folder / "checkpoints"
        self._dropped = 0  # steps in a row

    def __call__(
        self, step: int, metrics: dict[str, float], result: StepResult | None = None, forwards: int = 0
    ) -> None:
        """Collective.

        Args:
            step: Steps done.
            result: None where the step was saved before a signal cut its evaluation short.
            forwards: That the step took.

        Raises:
            Stopped: A signal came before the last step; the step is saved.
        """
        run, recipe = self._run, self._recipe
        last = step == run.total_steps
        try:
            scores = self._evaluate() if last or _due(step, recipe.eval.every) else {}
        except Stopped:
            if result is not None:
                self._save(step, {}, unevaluated=metrics)
            raise
        self.metrics_logger.write(metrics | {f"eval_{name}": value for name, value in scores.items()})
        saved = result is None
        if result is None:
            assert run.resumed is not None
            checkpoint.record_evaluation(run.resumed, scores, run.storage)
        else:
            self._dropped = 0 if result.applied else self._dropped + 1
            _check_dropped(step, self._dropped, recipe.train.max_nonfinite_steps, result.suspects)
            round_starts = run.rounds is not None and run.rounds.starts(step)
            if last or round_starts or _due(step, recipe.checkpoint.every) or self._is_best(scores):
                self._save(step, scores)
                saved = True
        if not last and self._watch.requested(forwards if run.policy.sharded else 0):
            if not saved:
                self._save(step, scores)
            raise Stopped

    def _evaluate(self) -> dict[str, float]:
        """Empty without `data.eval`."""
        run = self._run
        if run.eval_samples is None:
            return {}
        size = self._recipe.eval.batch_size
        return aggregate(evaluate(run.policy, run.eval_samples, run.tokenizer, size, poll=self._watch.poll))

    def _is_best(self, scores: dict[str, float]) -> bool:
        """Whether an evaluation beats those of all checkpoints; rank 0 looks, all ranks agree."""
        if not scores:
            return False
        verdict, metric = [False], self._recipe.eval.best
        if dist.get_rank() == 0:
            best = checkpoint.best_of(checkpoint.complete_checkpoints(self._checkpoints), metric)
            verdict = [best is None or checkpoint.better(scores[metric], best.metrics[metric], metric)]
        dist.broadcast_object_list(verdict, src=0)
        return verdict[0]

    def _save(self, step: int, scores: dict[str, float], unevaluated: dict[str, float] | None = None) -> None:
        self._watch.pause()
        self.metrics_logger.sync()
        run, recipe = self._run, self._recipe
        checkpoint.save(
            run.engine,
            self._checkpoints,
            step,
            run.data,
            scores,
            run.tokenizer,
            recipe.model,
            step_size=run.windows.step_size,
            storage=run.storage,
            unevaluated=unevaluated,
        )
        checkpoint.retain(self._checkpoints, recipe.checkpoint.keep, recipe.eval.best, run.storage)


def _check_dropped(step: int, dropped: int, limit: int, suspects: list[int]) -> None:
    if dropped:
        samples = f"sample ids {suspects}" if suspects else "the loss was finite, the gradient not"
        log.warning("step %d was dropped, %d in a row: not finite (%s)", step, dropped, samples)
    if dropped >= limit:
        raise RuntimeError(f"{dropped} steps in a row were dropped (train.max_nonfinite_steps)")
