"""`selfgen-ds evaluate`: a model folder on a data set -> `evaluation.json`, `predictions.jsonl`, `evaluation.png`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from selfgen_ds import __version__
from selfgen_ds.chat.template import asks_for_date
from selfgen_ds.config import EvaluateOptions, ModelConfig
from selfgen_ds.data.correction import Correction, correction
from selfgen_ds.data.encoding import Format
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.row_checks import Columns
from selfgen_ds.data.samples import Samples, end_tokens, first_rows, load
from selfgen_ds.data.tokenizer import generation_ends, load_tokenizer
from selfgen_ds.errors import InputError, Problems
from selfgen_ds.evaluation import results
from selfgen_ds.evaluation.answers import EvaluationRequests
from selfgen_ds.evaluation.journal import Journal
from selfgen_ds.evaluation.judge import Judge, length_controlled, other_answers
from selfgen_ds.evaluation.metrics import SampleScore, is_taken
from selfgen_ds.evaluation.perturbations import perturbed
from selfgen_ds.evaluation.recovery import ForcedError, forced_errors
from selfgen_ds.evaluation.scores import answered_length, corrected_length, evaluate
from selfgen_ds.evaluation.text_metrics import TextMetrics, load_embedder, load_metric
from selfgen_ds.files import make_folder
from selfgen_ds.model import attention, probe
from selfgen_ds.model.loading import build_model, model_config, most_positions
from selfgen_ds.model.policy import EnginePolicy
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import raise_on_all_ranks
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
    on_cpu = get_accelerator().device_name() == "cpu"  # no rank has chosen its device yet
    if told := attention.problem(options.attn_implementation, on_cpu, trains=False):
        problems.add(f"--attn_implementation: {told}")
    problems.raise_all()
    make_folder(Path(options.output_dir), "--output_dir")
    source = ModelConfig(
        name_or_path=options.model,
        attn_implementation=options.attn_implementation,
        chat_template=options.chat_template,
        trust_remote_code=options.trust_remote_code,
    )
    with problems.collect():
        text = text_metrics(options)
    problems.raise_all()
    with naming_the_options():
        tokenizer = load_tokenizer(source)
        config = model_config(source, tokenizer)
    source.dtype = _dtype(options, config)
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
    with raise_on_all_ranks() if dist.is_initialized() else nullcontext():
        judge = _judge(options)
    key = _key(options, text, samples)
    held = _from_rank_0(lambda: results.holds(options.output_dir, key))
    if held:
        log.info("%s holds this evaluation; remove evaluation.json to repeat it", options.output_dir)
        scores = results.read(options.output_dir) if process_group.rank() == 0 else []
    else:
        policy = _policy(source, config, traits, end_tokens(samples, tokenizer), options.batch_size)
        oracle = None if options.oracle is None else _oracle(options.oracle, options, tokenizer)
        requests = _requests(options, text, asked, forced_errors(samples, tokenizer), oracle)
        scores = _evaluate(policy, chosen, tokenizer, options, requests, key)
    with raise_on_all_ranks() if dist.is_initialized() else nullcontext():
        if process_group.rank() == 0:
            _write(scores, judge, options, results.About(samples=samples, dtype=source.dtype, key=key), held)


def _write(
    scores: list[SampleScore], judge: Judge | None, options: EvaluateOptions, about: results.About, held: bool
) -> None:
    """Write the results, ask the judge, if there is one, and print the summary.

    Args:
        held: Whether the folder holds these scores already.

    Raises:
        InputError: The judge does not answer; the other results are written.
    """
    if not held:
        results.put_aside(options.output_dir)
        results.write(scores, options, about, {})
    for journal in Path(options.output_dir).glob("evaluation*.journal"):
        journal.unlink()
    if judged := _judged(judge, scores, options):
        results.write(scores, options, about, judged)
    print(results.summary(scores, options.output_dir, about.samples))


def _policy(
    source: ModelConfig, config: PretrainedConfig, traits: probe.Traits, ends: list[int], batch_size: int
) -> EnginePolicy:
    """Load the model."""
    with naming_the_options():
        model = build_model(source, config, traits.logit_transform).to(process_group.device()).eval()
    return EnginePolicy(model, end_tokens=ends, generation_batch_size=batch_size, sharing=traits.sharing)


def _from_rank_0(compute: Callable[[], bool]) -> bool:
    """Return what rank 0 computes. Collective under a launcher: every rank must call this."""
    return process_group.from_rank_0(compute) if dist.is_initialized() else compute()


def _key(options: EvaluateOptions, text: TextMetrics, samples: list[Samples]) -> str:
    """Return a checksum of what the scores depend on."""
    aside = {"output_dir", "batch_size"}  # the scores depend on neither
    settings = {k: v for k, v in asdict(options).items() if k not in aside and not k.startswith("judge_")}
    paths = [options.model, options.oracle, options.embedding_model, options.chat_template]
    key = settings | {
        "files": [_files(path) for path in paths if path is not None],
        "metric": text.source,
        "rows": [source.checksum for source in samples],
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _oracle(name: str, options: EvaluateOptions, tokenizer: PreTrainedTokenizerBase) -> EnginePolicy:
    """Load the oracle.

    Raises:
        InputError: It cannot be loaded, or has other tokens than the model.
    """
    source = ModelConfig(
        name_or_path=name, attn_implementation=options.attn_implementation, trust_remote_code=options.trust_remote_code
    )
    try:
        own = load_tokenizer(source)
        config = model_config(source, own)
        source.dtype = _dtype(options, config)
        traits = probe.check(source, config, packing=False, training=False)
        if own.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"model.name_or_path: {name!r} has other tokens than the model")
        model = build_model(source, config, traits.logit_transform).to(process_group.device()).eval()
    except InputError as error:
        raise InputError(str(error).replace("model.name_or_path", "--oracle")) from error
    return EnginePolicy(model, end_tokens=[], sharing=traits.sharing)


def _requests(
    options: EvaluateOptions,
    text: TextMetrics,
    asked: Correction | None,
    errors: dict[int, ForcedError],
    oracle: EnginePolicy | None,
) -> EvaluationRequests:
    """Return what the options request of the model."""
    return EvaluationRequests(
        text=text,
        forced_errors=errors,
        forced_error_shares=tuple(options.forced_error_shares),
        max_new_tokens=options.max_new_tokens,
        sample_temperatures=tuple(options.sample_temperatures),
        answers_per_prompt=options.answers_per_prompt,
        prefix_shares=tuple(options.prefix_shares),
        oracle=oracle,
        seed=options.seed,
        correction=asked,
        correction_rounds=options.correction_rounds,
    )


def _evaluate(
    policy: EnginePolicy,
    chosen: list[TrainingRow],
    tokenizer: PreTrainedTokenizerBase,
    options: EvaluateOptions,
    requests: EvaluationRequests,
    key: str,
) -> list[SampleScore]:
    """Return the scores of all rows on rank 0, with those of the perturbed weights among their statistics.

    Collective: every rank must call this. Scores that an earlier start with the same options has left are not computed
    again.
    """
    scores: list[SampleScore] = []
    kinds = [*(f"noise_{share:g}" for share in options.weight_noise), *(f"int{bits}" for bits in options.weight_bits)]
    for kind in ["", *kinds]:
        journal = Journal(Path(options.output_dir) / f"evaluation{kind and '-'}{kind}.journal", key)
        if not kind:
            if journal.done:
                log.info("%d of %d rows have been evaluated before", len(journal.done), len(chosen))
            scores = evaluate(policy, chosen, tokenizer, options.batch_size, requests, journal=journal)
            continue
        greedy = EvaluationRequests(text=requests.text, max_new_tokens=requests.max_new_tokens)
        with perturbed(policy.model, kind, options.seed):
            told = f"evaluate {kind.replace('_', ' ')}"
            changed = evaluate(policy, chosen, tokenizer, options.batch_size, greedy, journal=journal, told=told)
        for score, other in zip(scores, changed, strict=True):
            score.statistics.update({f"{kind}_{name}": numbers for name, numbers in other.statistics.items()})
    return scores


def _judge(options: EvaluateOptions) -> Judge | None:
    """Return the judge, which has answered a first question; None if none is asked for.

    Raises:
        InputError: The judge does not answer.
    """
    if options.judge_url is None or options.judge_model is None:
        return None
    journal = Path(options.output_dir) / "judge.jsonl"
    judge = Judge(url=options.judge_url, model=options.judge_model, journal=journal)
    if process_group.rank() == 0:
        judge.check()
    return judge


def _judged(judge: Judge | None, scores: list[SampleScore], options: EvaluateOptions) -> dict[str, Any]:
    """Add the verdicts of a judge to the rows' statistics, and return what the evaluation says of them.

    Returns:
        Nothing without a judge.

    Raises:
        InputError: The judge does not answer, or there are no other answers to compare with.
    """
    if judge is None:
        return {}
    others = other_answers(options.judge_against, scores)
    verdicts = judge.verdicts(scores, others)
    for score, win in zip(scores, verdicts.wins, strict=True):
        score.statistics["win_rate"] = [win, 1.0]
    controlled = length_controlled(verdicts.wins, [score.answer for score in scores], others)
    told = {"judge": options.judge_model, "against": options.judge_against, "length_controlled_win_rate": controlled}
    return told | {"unclear": verdicts.unclear, "by_place": verdicts.by_place}


def _files(path: str) -> list[list[Any]]:
    """Return names, sizes and times of a file, or of a folder's files, so that a changed model is evaluated anew."""
    files = sorted(Path(path).glob("*")) if Path(path).is_dir() else [Path(path)] if Path(path).is_file() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime] for file in files]


def _dtype(options: EvaluateOptions, config: PretrainedConfig) -> Any:
    """Return the name of the type of weights: the option's, or the one that the model's folder names."""
    named = str(config.dtype).removeprefix("torch.")
    return options.dtype if options.dtype != "auto" else named if named in ("bfloat16", "float16") else "float32"


def text_metrics(options: EvaluateOptions) -> TextMetrics:
    """Return the metrics of texts that are asked for.

    Raises:
        InputError: The embedding model cannot be loaded, or there is no such function.
    """
    embedder = None if options.embedding_model is None else load_embedder(options.embedding_model)
    own = None if options.metric is None else load_metric(options.metric)
    if own is not None and is_taken(own[0]):
        raise InputError(f"--metric: {own[0]!r} is the name of a metric; give the function another name")
    return TextMetrics(embedder=embedder, own=own)


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
