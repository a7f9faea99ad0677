"""Write the table of model types in `docs/models.md` from runs of all causal model types of transformers.

For each type, the folder of a small model with random weights goes through `selfgen-ds train` under ZeRO-3, in one
process: as it is, with adapters, packed, and with answers that the model generates. Results are kept in
`build/architectures.json`: a second call continues where the first was stopped. A type takes about 10 s on an idle
core, and a few types take minutes.

    python docs/make_architectures.py [MODEL_TYPE ...]
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torch.utils.tensorboard  # which every run would import
import transformers
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from selfgen_ds.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, Recipe, SelfgenConfig, TrainConfig
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.model import probe, small_copy
from selfgen_ds.model.loading import model_config
from selfgen_ds.train import train

ROOT = Path(__file__).parent.parent
PAGE = Path(__file__).with_name("models.md")
TABLE = re.compile(r"(<!-- Written by `python docs/make_architectures.py`. -->\n\n).*?(?=\n## )", re.DOTALL)
RESULTS = ROOT / "build" / "architectures.json"
ROWS = [("one", "ab"), ("the next row", "a longer answer"), ("3", "c"), ("and more", "to read")]
SECONDS = 90
YES = "yes"
Attention = Literal["sdpa", "eager"]
FIELDS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
"""Model type -> fields without which its default configuration cannot be built, as published checkpoints have them."""


@dataclass(frozen=True, kw_only=True)
class Small:
    """The folder of a small model, in which its runs write too."""

    folder: Path
    attention: Attention
    """Attention implementation: `sdpa`, or `eager` for types without it."""
    checkpointing: bool = True
    """Whether the runs recompute activations."""


def model_types() -> list[str]:
    """Return the model types that transformers has a causal language model for."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING.keys()
    return sorted(name for name, config in CONFIG_MAPPING.items() if config in known)


def save(model_type: str, folder: Path) -> Attention:
    """Write the folder of a small model of a type, and return the attention implementation that the type has.

    Raises:
        Exception: No small model can be built from the type's default configuration.
    """
    tokenizer = byte_tokenizer()
    small_copy._VOCABULARY = len(tokenizer)
    config = AutoConfig.for_model(model_type, **FIELDS.get(model_type, {}))
    if config.is_encoder_decoder:
        raise InputError(f"model: expected a causal language model, got model type {model_type!r}")
    configs = [config]
    with suppress(AttributeError, ValueError, RuntimeError):  # `small_copy` says what is odd in the configuration
        configs.insert(0, small_copy._shallow(config))
    torch.manual_seed(0)
    model, attention = _built([_without_dropout(config) for config in configs])
    model.generation_config = GenerationConfig()  # some defaults name tokens that the small vocabulary lacks
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return attention


def _built(configs: list[PretrainedConfig]) -> tuple[PreTrainedModel, Attention]:
    """Return a small model of the first configuration that can be built, and its attention implementation.

    Raises:
        InputError: None of them can be built.
    """
    attentions: list[Attention] = ["sdpa", "eager"]
    problem = InputError("no configuration")
    for config, attention in itertools.product(configs, attentions):
        try:
            with torch.no_grad():
                return small_copy.small_copy(ModelConfig(preset={}, attn_implementation=attention), config), attention
        except InputError as error:
            problem = error
    raise problem


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Set every share of dropout and noise in a configuration and its sections to 0: a training loss is not random."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _without_dropout(value)
        elif isinstance(value, float) and ("drop" in name or "noise" in name):
            setattr(config, name, 0.0)
    return config


def plain_loss(folder: Path, attention: str) -> float:
    """Return the mean cross-entropy of completions and end tokens under plain transformers, which reads row by row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    tokenizer, losses = byte_tokenizer(), []
    for prompt, completion in ROWS:
        read, written = tokenizer(prompt).input_ids, [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([read + written]), use_cache=False).logits[0, len(read) - 1 : -1]
        losses.append(F.cross_entropy(logits.float(), torch.tensor(written), reduction="none"))
    return torch.cat(losses).mean().item()


def first_loss(small: Small, name: str, recipe: Recipe) -> float:
    """Train two steps of all rows in the folder `name`, and return the loss of the first step."""
    recipe.output_dir = str(small.folder / name)
    train(recipe, set())
    return json.loads((small.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["loss"]


def recipe_of(small: Small, learning_rate: float = 0.0) -> Recipe:
    """Return the recipe of two steps of sft."""
    return Recipe(
        output_dir="",
        deepspeed=str(ROOT / "ds_configs" / "zero3_cpu.json"),
        model=ModelConfig(
            name_or_path=str(small.folder / "model"), dtype="float32", attn_implementation=small.attention
        ),
        data=DataConfig(train=str(small.folder / "rows.jsonl"), max_length=64),
        selfgen=SelfgenConfig(method="sft"),
        optim=OptimConfig(learning_rate=learning_rate, warmup_ratio=0.0, schedule="constant"),
        train=TrainConfig(max_steps=2, micro_batch_size=len(ROWS), activation_checkpointing=small.checkpointing),
    )


def _equal(loss: float, expected: float) -> str:
    """Return `yes` if two losses are equal up to float32's rounding."""
    return YES if abs(loss - expected) <= 1e-4 * expected else f"loss {loss:.4f} instead of {expected:.4f}"


def _loss_and_export(small: Small) -> tuple[str, str]:
    """Train at a learning rate of 0; the exported tensors must be those that came in."""
    loss = _equal(first_loss(small, "plain", recipe_of(small)), plain_loss(small.folder / "model", small.attention))
    before, after = (load_file(small.folder / name / "model.safetensors") for name in ("model", "plain/model"))
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return loss, YES if same else "other tensors than came in"


def _lora(small: Small) -> str:
    """Train adapters; at first they change nothing, and the exported model is another one."""
    recipe, expected = recipe_of(small, 1e-2), plain_loss(small.folder / "model", small.attention)
    recipe.model.lora = LoraConfig()
    equal = _equal(first_loss(small, "lora", recipe), expected)
    trained = plain_loss(small.folder / "lora" / "model", small.attention)
    return equal if equal != YES or trained != expected else "adapters that train nothing"


def _packing(small: Small) -> str:
    """Train all rows in one packed row."""
    recipe = recipe_of(small)
    recipe.data = replace(recipe.data, packing=True)
    recipe.train.micro_batch_size = 1
    return _equal(first_loss(small, "packed", recipe), plain_loss(small.folder / "model", small.attention))


def _rollouts(small: Small) -> str:
    """Train on answers that the model generates, and say which prompts may share a batch."""
    recipe = recipe_of(small)
    recipe.selfgen = SelfgenConfig(method="rac", max_new_tokens=4)
    recipe.data.max_length = 128
    first_loss(small, "rollouts", recipe)
    config = model_config(recipe.model, byte_tokenizer())
    sharing = probe.check(recipe.model, config, packing=False, training=False).sharing
    return {"any": YES, "one length": "prompts of one length", "none": "one prompt at a time"}[sharing]


def _in_a_process(work: Callable[[Small], Any], small: Small) -> Any:
    """Return what `work` returns in a process of its own, or the first line of its error."""

    def tell(pipe: Connection) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            pipe.send(work(small))
        except Exception as error:
            pipe.send(str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}")

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=tell, args=(theirs,))
    process.start()
    theirs.close()
    try:
        result = ours.recv() if ours.poll(SECONDS) else f"not done within {SECONDS} s"
    except EOFError:
        result = "the process died"
    process.kill()
    process.join()
    return " ".join(result.split()) if isinstance(result, str) else result


def tried(model_type: str) -> dict[str, str]:
    """Return what becomes of a model type: property -> `yes`, or the reason why not."""
    with tempfile.TemporaryDirectory() as name:
        small = Small(folder=Path(name), attention="sdpa")
        attention = _in_a_process(lambda small: (save(model_type, small.folder), ""), small)
        if isinstance(attention, str):
            return {"tried": attention.replace(name, "FOLDER")}
        small = replace(small, attention=attention[0])
        results = {"attention": small.attention, "checkpointing": YES, "router loss": YES}
        plain = _in_a_process(_loss_and_export, small)
        if "router_aux_loss_coef: 0.0" in plain:
            results["router loss"] = "no"
            config = json.loads((small.folder / "model" / "config.json").read_text(encoding="utf-8"))
            (small.folder / "model" / "config.json").write_text(json.dumps(config | {"router_aux_loss_coef": 0.0}))
            plain = _in_a_process(_loss_and_export, small)
        if "activation_checkpointing" in plain:
            results["checkpointing"] = "no"
            small = replace(small, checkpointing=False)
            plain = _in_a_process(_loss_and_export, small)
        if isinstance(plain, str):
            return results | {"loss": plain.replace(name, "FOLDER")}
        results |= {"loss": plain[0], "export": plain[1]}
        for key, work in {"LoRA": _lora, "packing": _packing, "rollouts": _rollouts}.items():
            results[key] = str(_in_a_process(work, small)).replace(name, "FOLDER")
        return results


SHORT = {
    r".*is not causal.*": "refused: not causal",
    r".*expected a causal language model.*": "refused: no causal language model",
    r".*in a way that selfgen-ds does not support": "refused: its logits",
    r".*keep(s)? (the|packed) samples.*": "refused",
    r".*router loss cannot be computed.*": "refused: its router loss",
    r"model: (config\.json or model\.preset: )?no (small copy|model).*": "default configuration cannot be built",
    r"StrictDataclass.*": "default configuration cannot be built",
    r".*transformers cannot build it.*": "refused: transformers cannot build it under ZeRO-3",
    r".*get_seq_length.*": "not in transformers",  # the default configuration has no attention layer
    r".*lacks \d+ tensors.*": "refused: transformers does not find its norm under ZeRO-3",
    r"not done within.*": "too slow here",
}
"""Pattern of a reason -> its short form in the table."""


def table(results: dict[str, dict[str, str]]) -> str:
    """Return the table in Markdown: a row for all types of the same results, the row of the most types first."""
    columns = ("loss", "export", "LoRA", "packing", "rollouts", "checkpointing", "router loss")
    rows: dict[tuple[str, ...], list[str]] = {}
    for model_type, of_type in results.items():
        reason = of_type.get("tried", of_type.get("loss", YES))
        whole = () if reason == YES else (_short(reason),)
        rows.setdefault(whole or tuple(_short(of_type[column]) for column in columns), []).append(model_type)
    heads = ("model types", "loss", "export", "LoRA", "packing", "rollouts", "act. ckpt.", "router loss")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for cells, types in sorted(rows.items(), key=lambda row: (len(row[0]) == 1, -len(row[1]))):
        padded = (*cells, *[""] * (len(columns) - len(cells)))
        lines.append(f"| {', '.join(types)} | {' | '.join(padded)} |")
    return "\n".join(lines) + "\n"


def _short(reason: str) -> str:
    """Return a reason in the words of the table."""
    for pattern, words in SHORT.items():
        if re.fullmatch(pattern, reason):
            return words
    return reason.replace("|", "/")


def main() -> None:
    """Try the types that the command line names, or all that have no result yet, and write the table."""
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    transformers.logging.set_verbosity_error()
    RESULTS.parent.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    wanted = sys.argv[1:] or [name for name in model_types() if name not in results]
    for model_type in (bar := tqdm(wanted)):
        bar.set_postfix_str(model_type)
        results[model_type] = tried(model_type)
        RESULTS.write_text(json.dumps(results, indent=1), encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda match: match[1] + table(dict(sorted(results.items()))), text), encoding="utf-8")


if __name__ == "__main__":
    main()
