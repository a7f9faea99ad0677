"""The training loop: recipe -> data -> method -> engine -> metrics."""

from __future__ import annotations

import gc
import logging
import math
import shlex
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from deepspeed.accelerator import get_accelerator

from selfgen_ds.checkpoint import manifest, resuming, retention, saving
from selfgen_ds.checkpoint.export import export_engine
from selfgen_ds.config import OptimConfig, Recipe
from selfgen_ds.data.batches import StepBatches, TokenBatch
from selfgen_ds.data.prefetch import Prefetch
from selfgen_ds.engine.flops import StepFlops, step_flops
from selfgen_ds.engine.step import StepResult, train_step
from selfgen_ds.errors import Stopped
from selfgen_ds.evaluation.metrics import aggregate
from selfgen_ds.evaluation.scores import EvaluationRequests, evaluate
from selfgen_ds.methods.runaway import Runaway
from selfgen_ds.metrics_logger import MetricsLogger
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.watch import Watch
from selfgen_ds.rounds.rounds import RoundFacts
from selfgen_ds.setup.prepare import Run, prepare

log = logging.getLogger("selfgen_ds")

_COLLECT_EVERY = 100  # steps; left to itself, Python's collector stalls all ranks whenever it runs on one of them


def train(recipe: Recipe, overrides: set[str]) -> None:
    """Train, evaluate, save, and export as the recipe says. Collective: every rank must call this.

    Args:
        overrides: Settings that were given on the command line.

    Raises:
        InputError: Bad input or configuration, before the first step.
        Stopped: A signal came before the last step; everything is saved.
        RuntimeError: `train.max_nonfinite_steps` steps in a row had no finite loss or gradient.
    """
    with Watch(recipe.train.stall_seconds, recipe.checkpoint.stall_seconds) as watch:
        run = prepare(recipe, overrides, watch.poll)
        between_steps = BetweenSteps(run, recipe, watch)
        flops = step_flops(recipe, run.engine.module)
        watch.begin(run.engine.module, run.folder.path)
        gc.disable()
        between_steps.catch_up()
        ends_early = between_steps.stops_early()  # a run that has ended may be started again
        prefetch = Prefetch()
        for step in range(run.folder.first_step, run.total_steps):
            if ends_early:
                break
            batches = prefetch.at(batches_of(run, step), step, more=_shares_batches(run, step))
            forwards = watch.forwards
            metrics, result = take_step(run, recipe, step, batches, flops)
            ends_early = between_steps.after(step + 1, metrics, result, watch.forwards - forwards)
            if _due(step + 1, _COLLECT_EVERY):
                gc.collect()
        gc.enable()
        watch.saving()
        between_steps.metrics_logger.close()
        if ends_early:
            between_steps.load_best()
        folder = run.folder.path / "model"
        export_engine(run.engine, folder, run.tokenizer, run.config, run.source)
        log.info("training is done; the model is in %s; to ask it: %s", folder, _generate_command(run, recipe, folder))
        between_steps.metrics_logger.finish()


def batches_of(run: Run, step: int) -> StepBatches:
    """Return the batches that a step is among; a new round is drawn first. Collective: every rank must call this."""
    return run.step_batches if run.rounds is None else run.rounds.step_batches(step)


def _shares_batches(run: Run, step: int) -> bool:
    """Return whether the next step has its rows from the batches of this one."""
    return step + 1 < run.total_steps and (run.rounds is None or not run.rounds.starts(step + 1))


def take_step(
    run: Run, recipe: Recipe, step: int, batches_of_step: Future[list[TokenBatch]], flops: StepFlops
) -> tuple[dict[str, float], StepResult]:
    """Take one optimizer step, and return its line of `metrics.jsonl` and its result.

    Collective: every rank must call this.

    Args:
        step: Optimizer steps done before.
        batches_of_step: This rank's micro-batches, which may still be made.
        flops: Counts the operations of a step.
    """
    facts = None if run.rounds is None else run.rounds.facts(step)
    started, read_before = time.perf_counter(), run.policy.read_tokens
    get_accelerator().reset_peak_memory_stats()
    batches = batches_of_step.result()
    pass_started = time.perf_counter()
    batches = run.method.contexts(batches, run.policy, step)
    pass_time = time.perf_counter() - pass_started
    read, weight = run.policy.read_tokens - read_before, recipe.selfgen.drawn_context_weight
    if facts is not None and process_group.rank() == 0:  # the step adds up what the ranks have read
        read += facts.read_tokens
    dft = _has_dft(recipe.optim, step, run.total_steps)
    result = train_step(run.engine, batches, recipe.optim.label_smoothing, weight, read, dft)
    metrics = _metrics(run, step, result, facts, pass_time, time.perf_counter() - started)
    return metrics | {"flops": flops(result)}, result


def _has_dft(optim: OptimConfig, step: int, total_steps: int) -> bool:
    """Return whether a step, counted from 0, has the loss `dft`."""
    return optim.loss == "dft" and step >= min(round((1.0 - optim.dft_share) * total_steps), total_steps - 1)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _generate_command(run: Run, recipe: Recipe, folder: Path) -> str:
    """Return the command that answers prompts with the exported model in the form of the rows that it learned."""
    command = ["selfgen-ds", "generate", "--model", str(folder)]
    if run.tokenizer.chat_template and not any(source.conversations for source in run.samples):
        command += ["--as_chat", "false"]
    if recipe.data.prompt_template != "{prompt}" and any(source.pairs for source in run.samples):
        command += ["--prompt_template", recipe.data.prompt_template]
    return shlex.join(command)


def _metrics(
    run: Run, step: int, result: StepResult, facts: RoundFacts | None, pass_time: float, step_time: float
) -> dict[str, float]:
    """Return one line of `metrics.jsonl`.

    `step_time_s` does not include the time of drawing a round, `round_time_s`. `peak_memory_bytes` is that of rank 0;
    on a CPU, where no allocator counts, it is the resident set of rank 0's process, sampled here.
    """
    router_loss = {} if result.router_loss is None else {"router_loss": result.router_loss}
    probability, round_metrics = run.method.replace_probability(step), {}
    if facts is not None:
        probability = facts.replace_probability
        round_metrics = {
            "round": facts.number + 1,
            "round_time_s": facts.seconds,
            "round_differing_share": facts.differing_share,
        }
    return {
        "step": step + 1,
        "epoch": run.step_batches.epoch(step + 1),
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
        "tokens": result.tokens,
        "no_grad_tokens": result.no_grad_tokens,
        "tokens_per_second": result.tokens / step_time,
        "step_time_s": step_time,
        "pass_time_s": pass_time,
        "peak_memory_bytes": get_accelerator().max_memory_allocated(),
        "dropped": int(not result.applied),
    }


_WATCHED = ("step", "drawn_tokens", "replace_probability", "differing_share", "loss", "round", "round_differing_share")
"""Metrics of a step that show whether the run runs away; the last two are those of methods with rounds."""


class BetweenSteps:
    """The work between two steps: evaluate, log, save, and check for a stop signal.

    Collective: every rank must make one, because all replay the metrics that rank 0 has read.
    """

    def __init__(self, run: Run, recipe: Recipe, watch: Watch) -> None:
        self._run, self._recipe, self._watch = run, recipe, watch
        path = run.folder.path / "metrics.jsonl"
        watched = f"eval_{recipe.eval.best}"
        first_step, steps = run.folder.first_step, run.total_steps
        self.metrics_logger = MetricsLogger(path, run.engine.monitor, first_step, steps, watched)
        self._checkpoints = run.folder.path / "checkpoints"
        self._unverified: saving.Unverified | None = None
        self._dropped_in_a_row = 0
        self._runaway = Runaway()
        if "runaway" in run.method.settings:
            for line in process_group.from_rank_0(lambda: self.metrics_logger.take_history(_WATCHED)):
                if self._runs_away(line):
                    self._lower()

    def after(self, step: int, metrics: dict[str, float], result: StepResult, forwards: int) -> bool:
        """Run the work that is due after a step, and return whether the run ends early.

        Collective: every rank must call this.

        Args:
            step: Optimizer steps done.
            metrics: The step's line of `metrics.jsonl`.
            forwards: Forwards that this rank's model made in the step.

        Raises:
            Stopped: A signal came before the last step; the step is saved.
            RuntimeError: Too many steps in a row were not finite, or the last one was not.
        """
        if self._unverified is not None and self._unverified.is_read():
            self.complete_checkpoint()
        try:
            scores = self._evaluate(step)
        except Stopped:
            self._save(step, {}, unevaluated=metrics)
            self.complete_checkpoint()
            raise
        if scores:  # the best checkpoint is looked for among the complete ones
            self.complete_checkpoint()
        self._log(metrics, scores)
        self._check_dropped(step, result)
        self._check_runaway(step, metrics, scores)
        round_starts = self._run.rounds is not None and self._run.rounds.starts(step)
        due = self._is_last(step) or round_starts or _due(step, self._recipe.checkpoint.every)
        ends_early = bool(scores) and self.stops_early()
        saved = due or ends_early or self._is_best(scores)
        if saved:
            self._save(step, scores)
        if self._is_last(step) or round_starts or ends_early:  # drawing a round may take hours
            self.complete_checkpoint()
        in_lockstep = forwards if self._run.policy.sharded else 0
        if not self._is_last(step) and self._watch.requested(in_lockstep):
            if not saved:
                self._save(step, scores)
            self.complete_checkpoint()
            raise Stopped
        if self._is_last(step) and not result.applied:
            raise RuntimeError(
                f"the last step was dropped, {self._dropped_in_a_row} in a row: not finite; the run does not count as "
                "done, and no model is exported; its checkpoints are in checkpoints/"
            )
        return ends_early

    def catch_up(self) -> None:
        """Run the evaluation that a signal cut short in an earlier process, which then saved the step.

        Collective: every rank must call this.

        Raises:
            Stopped: A signal came again.
        """
        resumed = self._run.folder.resumed
        if resumed is None or resumed.unevaluated is None:
            return
        scores = self._evaluate(resumed.step)
        self._log(resumed.unevaluated, scores)
        self._check_runaway(resumed.step, resumed.unevaluated, scores)
        saving.record_evaluation(resumed, scores, self._run.folder.storage)
        if not self._is_last(resumed.step):
            self._watch.poll()

    def stops_early(self) -> bool:
        """Return whether the last `eval.patience` evaluations were no better than one before them.

        Collective: every rank must call this, because rank 0 decides.
        """
        patience, metric = self._recipe.eval.patience, self._recipe.eval.best

        def is_worse() -> bool:
            values, best = list(self.metrics_logger.watched.values()), 0
            for i, value in enumerate(values):
                best = i if manifest.better(value, values[best], metric) else best
            return len(values) - 1 - best >= (patience or 0)

        return patience is not None and process_group.from_rank_0(is_worse)

    def load_best(self) -> None:
        """Load the weights of the checkpoint with the best evaluation. Collective: every rank must call this."""
        run, recipe = self._run, self._recipe
        log.info("%d evaluations in a row were no better than one before them: the run ends", recipe.eval.patience)
        best = resuming.find_best(self._checkpoints, run.folder.storage, recipe.eval.best)
        if best is None:
            log.warning("no intact checkpoint of this number of ranks has an evaluation: the last step is exported")
        else:
            log.info("%s has the best evaluation, and is exported", best.path.name)
            resuming.load(run.engine, best, recipe.seed, recipe.trust_checkpoint)

    def _is_last(self, step: int) -> bool:
        return step == self._run.total_steps

    def _evaluate(self, step: int) -> dict[str, float]:
        """Return the metrics of an evaluation; nothing if no evaluation is due."""
        run = self._run
        if not run.eval_samples or not (self._is_last(step) or _due(step, self._recipe.eval.every)):
            return {}
        size, temperatures = self._recipe.eval.batch_size, tuple(self._recipe.eval.sample_temperatures)
        requests = EvaluationRequests(
            forced_errors=run.forced_errors, sample_temperatures=temperatures, seed=self._recipe.seed
        )
        scores = evaluate(run.policy, run.eval_samples, run.tokenizer, size, requests, self._watch.poll)
        self.metrics_logger.show_answers(step, scores[: self._recipe.eval.shown_answers])
        return process_group.from_rank_0(lambda: aggregate(scores))

    def _log(self, metrics: dict[str, float], scores: dict[str, float]) -> None:
        self.metrics_logger.write(metrics | {f"eval_{name}": value for name, value in scores.items()})

    def _check_dropped(self, step: int, result: StepResult) -> None:
        """Count steps in a row that DeepSpeed dropped because loss or gradient was not finite."""
        if result.applied:
            self._dropped_in_a_row = 0
            return
        self._dropped_in_a_row += 1
        cause = f"sample ids {result.suspects}" if result.suspects else "the loss was finite, the gradient was not"
        log.warning("step %d was dropped, %d in a row: not finite (%s)", step, self._dropped_in_a_row, cause)
        if self._dropped_in_a_row >= self._recipe.train.max_nonfinite_steps:
            self.complete_checkpoint()
            raise RuntimeError(
                f"{self._dropped_in_a_row} steps in a row were dropped (train.max_nonfinite_steps): lower "
                "optim.learning_rate, or look at the samples that the log names"
            )

    def _runs_away(self, metrics: Mapping[str, float | None]) -> str:
        """Return what has happened if the run runs away after a step, as its line of `metrics.jsonl` says."""
        step, drawn, probability, differing, loss, number, of_round = (metrics.get(name) for name in _WATCHED)
        loss = math.nan if loss is None else loss
        # The loss of DFT falls as targets get improbable.
        watched = None if _has_dft(self._recipe.optim, int(step or 1) - 1, self._run.total_steps) else loss
        probability, told = probability or 0.0, ""
        if number is not None and of_round is not None:
            told = self._runaway.update_round(int(number), probability, of_round)
        return told or self._runaway.update(probability if drawn else 0.0, differing or 0.0, watched)

    def _lower(self) -> None:
        if self._recipe.selfgen.runaway == "lower":
            self._run.method.scale /= 2

    def _check_runaway(self, step: int, metrics: dict[str, float], scores: dict[str, float]) -> None:
        """Say that the run runs away, and stop it or lower p if the recipe asks for that.

        Collective: every rank must call this, with the same metrics.

        Raises:
            RuntimeError: The run runs away, and is to stop; the step is saved.
        """
        if not (told := self._runs_away(metrics)):
            return
        advice = "a smaller selfgen.replace_probability, max_differing_tokens: 1 or optim.loss: dft may help"
        reaction = self._recipe.selfgen.runaway
        done = {"warn": "", "stop": "; the run stops", "lower": "; p is halved"}[reaction]
        self.metrics_logger.warn(step, f"{told}{done}; {advice}")
        self._lower()
        if reaction == "stop":
            self._save(step, scores)
            self.complete_checkpoint()
            raise RuntimeError(f"{told} (selfgen.runaway: stop); {advice}")

    def _is_best(self, scores: dict[str, float]) -> bool:
        """Return whether an evaluation is better than that of every checkpoint: rank 0 decides for all ranks.

        Collective: every rank must call this.
        """
        metric = self._recipe.eval.best

        def is_best() -> bool:
            best = manifest.best_of(manifest.complete_checkpoints(self._checkpoints), metric)
            return best is None or manifest.better(scores[metric], best.metrics[metric], metric)

        return bool(scores) and process_group.from_rank_0(is_best)

    def _save(self, step: int, scores: dict[str, float], unevaluated: dict[str, float] | None = None) -> None:
        """Write a checkpoint, which is verified while the next steps are taken."""
        self._watch.saving()
        self.complete_checkpoint()
        self.metrics_logger.sync()
        run, storage = self._run, self._run.folder.storage
        checkpoint = manifest.Checkpoint(
            path=manifest.path_of(self._checkpoints, step),
            step=step,
            step_size=run.step_batches.step_size,
            data=run.data_checksum,
            metrics=scores,
            unevaluated=unevaluated,
        )
        self._unverified = saving.save(run.engine, run.tokenizer, run.config, run.source, checkpoint, storage)

    def complete_checkpoint(self) -> None:
        """Wait until the last checkpoint is verified, and remove those that it replaces.

        Collective: every rank must call this.
        """
        if self._unverified is None:
            return
        self._unverified.complete()
        self._unverified = None
        keep, best = self._recipe.checkpoint.keep, self._recipe.eval.best
        retention.retain(self._checkpoints, keep, best, self._run.folder.storage)
