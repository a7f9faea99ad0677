"""Tokenizers: any Hugging Face tokenizer by path or id, and the built-in byte tokenizer."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.chat_template_utils import _compile_jinja_template

from selfgen_ds.config import ModelConfig
from selfgen_ds.data.hub import use_cache_without_network
from selfgen_ds.errors import InputError
from selfgen_ds.files import refusal


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of 258 tokens: the 256 bytes, `<pad>`, and `</s>`. It needs no file to be downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a recipe names. A tokenizer without a padding token pads with its end token.

    Raises:
        InputError: The tokenizer cannot be loaded, or has no end token, without which a model cannot learn to stop.
    """
    tokenizer = byte_tokenizer() if model.tokenizer == "byte" else _load(model)
    if model.chat_template is not None:
        tokenizer.chat_template = _read_template(model.chat_template)
    return tokenizer


def _read_template(path: str) -> str:
    """Return the chat template in a file.

    Raises:
        InputError: The file cannot be read, or is no template.
    """
    try:
        template = Path(path).read_text(encoding="utf-8")
        _compile_jinja_template(template)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"model.chat_template: {refusal(error) or f'{path}: {error}'}") from error
    except TemplateSyntaxError as error:
        raise InputError(f"model.chat_template: {path}, line {error.lineno}: {error.message}") from error
    if not template.strip():
        raise InputError(f"model.chat_template: {path}: expected a chat template, got an empty file")
    return template


def generation_ends(model: ModelConfig) -> tuple[int, ...]:
    """Return the tokens that a model's generation configuration names as ends of an answer; none without a model."""
    try:
        ends = GenerationConfig.from_pretrained(model.name_or_path).eos_token_id if model.name_or_path else None
    except OSError:  # it has no generation configuration
        ends = None
    return tuple(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _load(model: ModelConfig) -> PreTrainedTokenizerBase:
    name = model.tokenizer or model.name_or_path
    setting = "model.tokenizer" if model.tokenizer else "model.name_or_path"
    if not Path(str(name)).is_dir():
        use_cache_without_network()
    elif not model.tokenizer:
        _check_is_model(Path(str(name)))
    try:
        # For some model types AutoTokenizer ignores the general class that the folder names, and loads a class that
        # adds tokens.
        general = get_tokenizer_config(name).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        loader = PreTrainedTokenizerFast if general else AutoTokenizer
        tokenizer = loader.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # the type depends on which file is damaged, and how
        reason = " ".join(str(error).split())
        if reason.startswith("Couldn't instantiate the backend tokenizer"):
            reason = "it has no tokenizer that can be read; copy the files of its tokenizer there"
        raise InputError(f"{setting}: no tokenizer could be loaded from {name!r}: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{setting}: the tokenizer {name!r} has no end-of-sequence token (`eos_token`)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_is_model(folder: Path) -> None:
    """Check that a folder holds a model or an adapter, as far as the names of its files tell.

    Raises:
        InputError: It does not. The message names a run's own model if the folder is that of a run.
    """
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        meant = f"; did you mean {folder / 'model'}?" if (folder / "model" / "config.json").exists() else ""
        raise InputError(f"model.name_or_path: the folder {str(folder)!r} is no model: it has no config.json{meant}")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the files that a tokenizer is saved as."""
    tokenizer("")  # the first call resets truncation and padding, which are also saved
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
