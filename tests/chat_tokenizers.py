"""Small tokenizers for the tests, with the chat templates of the model families that people train."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiers import sweep

_CORPUS = [
    "the user asks a question and the assistant answers it with a short and helpful text",
    "system\nYou are a helpful assistant.\n\nuser\nHow many apples are left?\n\nassistant\nThere are three left.",
    "What is 12 + 30? It is 42. Is it? Yes, it is the answer to the question. [INST] [/INST] <s> </s>",
    "Thank you! You are welcome, and the same to you. Ä Ö ü é 日本語 😀",
] * 3
# The pattern of Llama 3 and similar models: line ends form one piece, alone or after punctuation.
_WITH_LINE_ENDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

CHATML = """
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

CHATML_GENERATION = """
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}
{%- if m['role'] == 'assistant' %}{% generation %}
{%- if m['content'] %}{{ m['content'] }}{% endif %}
{%- for call in m['tool_calls'] or [] %}{{ '<call>' + (call | tojson) + '</call>' }}{% endfor %}
{{- '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"""

QWEN3 = """
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}
{%- if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' + m['content'].lstrip('\\n') }}
{%- else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"""

LLAMA3 = """
{%- for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"""

_SYSTEM_APART = """
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}{% set system = none %}{% set rest = messages %}{% endif %}"""

LLAMA2 = f"""{_SYSTEM_APART}
{{%- for m in rest %}}
{{%- if m['role'] == 'user' %}}
{{%- set rules = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system and loop.first else '' %}}
{{{{- bos_token + '[INST] ' + (rules + m['content']).strip() + ' [/INST]' }}}}
{{%- else %}}{{{{ ' ' + m['content'].strip() + ' ' + eos_token }}}}{{% endif %}}{{% endfor %}}"""

MISTRAL = f"""{_SYSTEM_APART}{{{{ bos_token }}}}
{{%- for m in rest %}}
{{%- if m['role'] == 'user' %}}
{{{{- ' [INST] ' + (system + '\\n\\n' if system and loop.first else '') + m['content'] + ' [/INST]' }}}}
{{%- else %}}{{{{ ' ' + m['content'] + eos_token }}}}{{% endif %}}{{% endfor %}}"""

MISTRAL_V3 = f"""{_SYSTEM_APART}{{{{ bos_token }}}}
{{%- for m in rest %}}
{{%- if m['role'] == 'user' %}}
{{%- set rules = system + '\\n\\n' if system and loop.index >= loop.length - 1 else '' %}}
{{{{- '[INST] ' + rules + m['content'] + '[/INST]' }}}}
{{%- else %}}{{{{ ' ' + m['content'] | trim + eos_token }}}}{{% endif %}}{{% endfor %}}"""

GEMMA = """
{{- bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"""

ZEPHYR = """
{%- for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"""

PHI3 = """
{%- for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}{{ eos_token }}"""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A chat template, the kind of tokenizer that goes with it, and the result that a test expects."""

    template: str
    tokenizer: str
    """`byte_level`, `line_ends`, `metaspace`, `prepending` or `replacing`."""
    special: tuple[str, ...]
    bos: str | None = None
    eos: str
    closing: str
    """Text that closes the assistant's turn."""
    trims: bool = False
    """Whether the template strips the assistant's content."""
    system: bool = True
    """Whether the template accepts a system message."""


_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_PHI3_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
_GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")

FAMILIES = {
    "chatml": Family(
        template=CHATML, tokenizer="byte_level", special=_CHATML_TOKENS, eos="<|im_end|>", closing="<|im_end|>"
    ),
    "chatml with generation markers": Family(
        template=CHATML_GENERATION,
        tokenizer="byte_level",
        special=_CHATML_TOKENS,
        eos="<|im_end|>",
        closing="<|im_end|>",
    ),
    "llama3": Family(
        template=LLAMA3,
        tokenizer="byte_level",
        special=_LLAMA3_TOKENS,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        closing="<|eot_id|>",
        trims=True,
    ),
    "llama2": Family(
        template=LLAMA2,
        tokenizer="prepending",
        special=("<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        closing=" </s>",
        trims=True,
    ),
    "mistral": Family(
        template=MISTRAL, tokenizer="metaspace", special=("<s>", "</s>"), bos="<s>", eos="</s>", closing="</s>"
    ),
    "mistral v3": Family(
        template=MISTRAL_V3,
        tokenizer="metaspace",
        special=("<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        closing="</s>",
        trims=True,
    ),
    "gemma": Family(
        template=GEMMA,
        tokenizer="replacing",
        special=_GEMMA_TOKENS,
        bos="<bos>",
        eos="<eos>",
        closing="<end_of_turn>",
        trims=True,
        system=False,
    ),
    "zephyr": Family(
        template=ZEPHYR, tokenizer="metaspace", special=("<s>", "</s>"), bos="<s>", eos="</s>", closing="</s>"
    ),
    "phi3": Family(template=PHI3, tokenizer="metaspace", special=_PHI3_TOKENS, eos="<|endoftext|>", closing="<|end|>"),
    "line ends that merge": Family(
        template=CHATML, tokenizer="line_ends", special=_CHATML_TOKENS, eos="<|im_end|>", closing="<|im_end|>"
    ),
    "qwen3": Family(
        template=QWEN3, tokenizer="byte_level", special=_CHATML_TOKENS, eos="<|im_end|>", closing="<|im_end|>"
    ),
}


# in `make check`: a byte-level tokenizer, and one whose template strips contents and whose tokenizer adds a space
_IN_CHECK = ("chatml", "llama2")
EVERY_FAMILY = sweep("family", [*_IN_CHECK, *(family for family in FAMILIES if family not in _IN_CHECK)], check=2)


@functools.cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of one of `FAMILIES`."""
    given = FAMILIES[family]
    return build(given.template, given.tokenizer, given.special, given.bos, given.eos)


def build(
    template: str | None, kind: str, special: tuple[str, ...], bos: str | None, eos: str
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of some kind (see `Family.tokenizer`) on a few sentences."""
    result = PreTrainedTokenizerFast(
        tokenizer_object=_backend(kind),
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=[token for token in special if token not in (bos, eos)],
        clean_up_tokenization_spaces=False,
    )
    result.chat_template = template
    return result


def _backend(kind: str) -> Tokenizer:
    if kind in ("byte_level", "line_ends"):
        trained = Tokenizer(models.BPE())
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "byte_level")
        split = pre_tokenizers.Split(Regex(_WITH_LINE_ENDS), "isolated")
        trained.pre_tokenizer = pieces if kind == "byte_level" else pre_tokenizers.Sequence([split, pieces])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        corpus = _CORPUS if kind == "byte_level" else [*_CORPUS, *["a\n\nb\n\n\nc.\n\nd!\ne>\nf>\n\ng"] * 20]
        trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
        trained.decoder = decoders.ByteLevel()
        return trained
    # Like a sentencepiece tokenizer: a space is `▁`, and text that is not in the vocabulary becomes bytes.
    scratch = Tokenizer(models.BPE())
    scratch.normalizer = normalizers.Replace(" ", "▁")
    scratch.pre_tokenizer = pre_tokenizers.Split(Regex("\\n|▁?[^▁\\n]+"), "isolated")
    scratch.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=300))
    learned = scratch.get_vocab()
    merges = [(left, right) for left, right in json.loads(scratch.to_str())["model"]["merges"]]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learned, key=lambda token: learned[token])]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind == "prepending":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend
