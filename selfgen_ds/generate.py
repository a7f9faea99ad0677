"""`selfgen-ds generate`: answers of a model to a prompt, to a file of prompts, or in a chat at the terminal.

Plain transformers generates the answers, one prompt at a time, as a user of the exported model would.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    BatchEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

from selfgen_ds.chat.contents import check_shown
from selfgen_ds.chat.conversation import Conversation, Message, forms
from selfgen_ds.chat.template import RAISES, ChatTemplate
from selfgen_ds.checkpoint.export import export_checkpoint
from selfgen_ds.checkpoint.manifest import MARKER
from selfgen_ds.config import GenerateOptions, ModelConfig
from selfgen_ds.data.formats import READERS, read_file, suffix
from selfgen_ds.data.message_checks import are_messages, check_text, prompt_of
from selfgen_ds.data.row_checks import alpaca_prompt, sharegpt_messages
from selfgen_ds.data.tokenizer import load_tokenizer
from selfgen_ds.errors import InputError, Problems
from selfgen_ds.model.loading import model_config, most_positions
from selfgen_ds.progress import bar
from selfgen_ds.ranks import process_group
from selfgen_ds.validation.options import check_generate, naming_the_options

log = logging.getLogger("selfgen_ds")

_LONGEST = 256
"""Tokens of the longest answer, unless an option says otherwise."""
_CUT = "the answer was cut at --max_new_tokens"
Prompt = str | Conversation
"""What a model is asked: a text, or messages."""


def run(options: GenerateOptions) -> None:
    """Load a model, and print its answers or write them to a file.

    Raises:
        InputError: The options, the model, or a prompt are not as expected.
    """
    problems = Problems()
    check_generate(problems, options)
    problems.raise_all()
    prompts = None if options.prompts is None else _read_prompts(Path(options.prompts), options.prompt_column)
    with _model_folder(options) as folder, naming_the_options():
        answerer = _Answerer(options, folder)
        if prompts is not None:
            _answer_all(options, prompts, answerer)
        elif options.prompt is not None:
            _, ended = answerer.answer(answerer.encode(options.prompt), show=True)
            if not ended:
                print(_CUT, file=sys.stderr)
        else:
            _chat(answerer)


@contextmanager
def _model_folder(options: GenerateOptions) -> Iterator[str]:
    """Give the name of the model, or a temporary folder to which a checkpoint is exported."""
    if not (Path(options.model) / MARKER).is_file():
        yield options.model
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        export_checkpoint(Path(options.model), folder, trust_remote_code=options.trust_remote_code)
        yield str(folder)


class _Answerer:
    """A loaded model that answers prompts."""

    def __init__(self, options: GenerateOptions, folder: str) -> None:
        trust = options.trust_remote_code
        source = ModelConfig(name_or_path=folder, chat_template=options.chat_template, trust_remote_code=trust)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(source)
        config = model_config(source, self.tokenizer)
        self.model = _load_model(folder, config, trust).to(process_group.device()).eval()
        self.in_template = bool(self.tokenizer.chat_template) if options.as_chat is None else options.as_chat
        if self.in_template and not self.tokenizer.chat_template:
            raise InputError("--as_chat: expected a model with a chat template")
        log.info("prompts are read %s", "in the chat template" if self.in_template else "as they are")
        settings = self.model.generation_config
        settings.do_sample, settings.temperature = options.temperature > 0, options.temperature or None
        settings.top_p = settings.top_k = settings.max_length = None
        settings.pad_token_id = self.tokenizer.pad_token_id
        settings.num_beams = 1
        ends = settings.eos_token_id
        self._ends = ends if isinstance(ends, list) else [self.tokenizer.eos_token_id if ends is None else ends]
        self._prompt_template, self._template_kwargs = options.prompt_template, options.chat_template_kwargs
        if self.in_template:
            self._template = ChatTemplate(self.tokenizer)
            if not self._template.knows_generation_prompt:
                log.warning(
                    "the chat template writes no generation prompt (add_generation_prompt): an answer starts with what "
                    "the template writes before it"
                )
        self._longest, self._positions = options.max_new_tokens, most_positions(config)
        set_seed(options.seed)

    def encode(self, prompt: Prompt, where: str = "--prompt") -> BatchEncoding:
        """Return what the model reads of a prompt.

        Args:
            where: Where the prompt comes from, for errors.

        Raises:
            InputError: The chat template does not take it, or it leaves no room for an answer.
        """
        if isinstance(prompt, str):
            text = self._prompt_template.replace("{prompt}", prompt)
            if not self.in_template:
                return self._checked(self.tokenizer(text, return_tensors="pt", split_special_tokens=True), where)
            prompt = Conversation(messages=[{"role": "user", "content": text}])
        if not self.tokenizer.chat_template:
            raise InputError(f"{where}: messages need a model with a chat template (--chat_template)")
        problem = ""
        for _, form in forms(0, replace(prompt, where=where)):
            try:
                check_shown(self._template, form)
                encoded = self.tokenizer.apply_chat_template(
                    form.messages,
                    tools=form.tools,
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=True,
                    sanitize_control_tokens=True,
                    **self._template_kwargs | form.template_kwargs,
                )
            except InputError as error:
                problem = problem or str(error)
            except Exception as error:  # a template can raise anything
                problem = problem or f"{where}: {RAISES}: {' '.join(str(error).split())}"
            else:
                return self._checked(encoded, where)
        raise InputError(problem)

    def _checked(self, encoded: BatchEncoding, where: str) -> BatchEncoding:
        room = self._room(encoded)
        if room is not None and room < (self._longest or 1):
            needed = f"{self._longest} (--max_new_tokens)" if self._longest else "1"
            raise InputError(f"{where}: the model has positions for {max(0, room)} more tokens, expected {needed}")
        return encoded

    def _room(self, encoded: BatchEncoding) -> int | None:
        return None if self._positions is None else self._positions - encoded["input_ids"].shape[1]

    def answer(self, encoded: BatchEncoding, show: bool = False) -> tuple[str, bool]:
        """Return the answer to an encoded prompt, and whether the model ended it.

        Args:
            show: Whether the answer is printed while it is generated.
        """
        given = {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        self.model.generation_config.max_new_tokens = self._longest or min(_LONGEST, self._room(encoded) or _LONGEST)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
        with torch.inference_mode():
            ids = self.model.generate(**given, streamer=streamer)
        written = ids[0, given["input_ids"].shape[1] :].tolist()
        return self.tokenizer.decode(written, skip_special_tokens=True), bool(written) and written[-1] in self._ends


def _load_model(folder: str, config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Load a model as plain transformers does, in its own dtype."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype="auto", trust_remote_code=trust_remote_code
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"--model: no weights from {folder!r}: {str(error).strip().splitlines()[0]}") from error


def _read_prompts(path: Path, column: str) -> list[tuple[str, Prompt]]:
    """Read prompts with their places: the lines of a text file, or rows.

    A row has the prompt in the field `column`, or is a conversation or a row of Alpaca, whose answer is left out.

    Raises:
        InputError: The file cannot be read or has no prompt, or a row has none. The message names the row.
    """
    if not path.is_file():
        raise InputError(f"--prompts: expected a file, got {str(path)!r}")
    if path.suffix.lower() == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
        prompts: list[tuple[str, Prompt]] = [
            (f"{path}, line {i}", line) for i, line in enumerate(lines, start=1) if line.strip()
        ]
    elif suffix(path) in READERS:
        prompts = [(f"{path}, {where}", _prompt(row, column, f"{path}, {where}")) for where, row in read_file(path)]
    else:
        raise InputError(f"{path}: expected a file that ends in .txt, {', '.join(READERS)}")
    if not prompts:
        raise InputError(f"{path}: expected prompts, got none")
    return prompts


def _prompt(row: dict[str, Any] | InputError, column: str, where: str) -> Prompt:
    if isinstance(row, InputError):
        raise row
    name = "messages" if row.get(column) is None and "messages" in row else column
    given: Any = row.get(name)
    if given is None and "conversations" in row:
        name = "conversations"
        given = sharegpt_messages(row, f"{where}, field {name!r}")
    elif given is None and "instruction" in row:
        return alpaca_prompt(row, where)
    elif name not in row:
        raise InputError(f"{where}: expected the field {name!r} (--prompt_column), got the fields {sorted(row)}")
    if not are_messages(given):
        return check_text(given, f"{where}, field {name!r}")
    answered = len(given) > 1 and given[-1].get("role") == "assistant"  # the reference, as `evaluate` takes it
    return prompt_of(given[:-1] if answered else given, row, where, f"{where}, field {name!r}")


def _answer_all(options: GenerateOptions, prompts: list[tuple[str, Prompt]], answerer: _Answerer) -> None:
    """Answer all prompts, if the model can read each of them; every line of the result is a JSON object."""
    unfinished = 0
    encoded = [answerer.encode(prompt, where) for where, prompt in prompts]
    with open(options.output, "w", encoding="utf-8") if options.output else nullcontext(sys.stdout) as file:
        both = zip(prompts, encoded, strict=True)
        progress = bar("generate", "answer", iterable=both, total=len(prompts), disable=not options.output)
        for (_, prompt), given in progress:
            answer, ended = answerer.answer(given)
            unfinished += not ended
            shown = prompt if isinstance(prompt, str) else prompt.messages
            file.write(json.dumps({"prompt": shown, "answer": answer, "ended": ended}, ensure_ascii=False) + "\n")
            file.flush()
    if unfinished:
        print(f"{unfinished} of {len(prompts)} answers were cut at --max_new_tokens", file=sys.stderr)


def _chat(answerer: _Answerer) -> None:
    """Answer what is typed, in one conversation if the model has a chat template; an empty line starts a new one."""
    if sys.stdin.isatty():
        print("Type a message. An empty line starts a new conversation, Ctrl-D ends.", file=sys.stderr)
    messages: list[Message] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        prompt = Conversation(messages=messages) if answerer.in_template else line
        answer, ended = answerer.answer(answerer.encode(prompt, "the conversation"), show=True)
        if not ended:
            print(_CUT, file=sys.stderr)
        messages.append({"role": "assistant", "content": answer})
