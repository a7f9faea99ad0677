import os
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoConfig, AutoTokenizer

from selfgen_ds.config import ModelConfig
from selfgen_ds.data.tokenizer import byte_tokenizer, load_tokenizer
from selfgen_ds.errors import InputError

TEXTS = [
    "plain",
    " a space on either side ",
    "\n\nlines\r\n\tand tabs\n",
    "  two  spaces   three , ! ' n't",
    "😀 👩‍👩‍👧 🇩🇪",
    "日本語 العربية ñ e\u0301",
    bytes(range(256)).decode("latin-1"),
    "\U0010ffff\ufeff\u2028\x00",
    "",
]


def test_a_byte_is_a_token_and_bytes_round_trip() -> None:
    tokenizer = byte_tokenizer()
    for text, ids in zip(TEXTS, tokenizer(TEXTS)["input_ids"], strict=True):
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_byte_is_always_the_same_token_and_another_byte_another() -> None:
    text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 63), *range(0xE000, 0x110000, 63)]))
    pairs = set(zip(text.encode(), byte_tokenizer()(text)["input_ids"], strict=True))
    # 13 bytes never occur in UTF-8: C0, C1 and F5 to FF
    assert len(pairs) == len({byte for byte, _ in pairs}) == len({token for _, token in pairs}) == 256 - 13


def test_there_are_258_tokens() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 258
    assert sorted(tokenizer.get_vocab().values()) == list(range(258))


def test_end_and_padding_are_tokens_beside_the_bytes() -> None:
    tokenizer = byte_tokenizer()
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id} == {256, 257}


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_a_saved_tokenizer_decodes_the_same_text(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded.decode(ids, skip_special_tokens=True) for ids in loaded(TEXTS)["input_ids"]] == TEXTS


def test_the_recipe_gets_the_byte_tokenizer_by_name() -> None:
    assert len(load_tokenizer(ModelConfig(preset={}, tokenizer="byte"))) == 258


def test_the_recipe_gets_the_model_folders_tokenizer(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert len(load_tokenizer(ModelConfig(name_or_path=str(tmp_path)))) == 258


def test_a_folder_that_is_no_model_is_an_error_that_names_the_model_inside(tmp_path: Path) -> None:
    no_model = rf"^model\.name_or_path: the folder '{tmp_path}' is no model: it has no config\.json"
    with pytest.raises(InputError, match=no_model + "$"):
        load_tokenizer(ModelConfig(name_or_path=str(tmp_path)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=rf"{no_model}; did you mean {tmp_path}/model\?$"):
        load_tokenizer(ModelConfig(name_or_path=str(tmp_path)))


def test_a_folder_without_a_tokenizer_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    reason = "it has no tokenizer that can be read; copy the files of its tokenizer there"
    with pytest.raises(InputError, match=f"^model.name_or_path: no tokenizer .* from '{tmp_path}': {reason}$"):
        load_tokenizer(ModelConfig(name_or_path=str(tmp_path)))
    with pytest.raises(InputError, match=rf"^model\.tokenizer: no tokenizer could be loaded from '{tmp_path}'"):
        load_tokenizer(ModelConfig(name_or_path="elsewhere", tokenizer=str(tmp_path)))


def test_a_tokenizer_without_an_end_token_is_an_error(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no end-of-sequence token"):
        load_tokenizer(ModelConfig(preset={}, tokenizer=str(tmp_path)))


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(preset={}, tokenizer=str(tmp_path)))
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"added_tokens": [], "model": {"type": "XYZ"}}'])
def test_a_damaged_file_of_a_tokenizer_is_an_error_that_names_the_setting(
    tmp_path: Path, name: str, content: bytes
) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"^model\.tokenizer: .+$"):
        load_tokenizer(ModelConfig(preset={}, tokenizer=str(tmp_path)))


def test_a_hub_id_without_a_hub_is_refused_in_one_line() -> None:
    expected = r"^model\.name_or_path: no tokenizer could be loaded from 'nobody/nothing': .+$"
    with pytest.raises(InputError, match=expected) as caught:
        load_tokenizer(ModelConfig(name_or_path="nobody/nothing"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_without_a_network_a_hub_id_is_refused_in_one_line_and_quickly(tmp_path: Path) -> None:
    program = (
        "import time\nfrom selfgen_ds.config import ModelConfig\nfrom selfgen_ds.errors import InputError\n"
        "from selfgen_ds.data.tokenizer import load_tokenizer\nstarted = time.monotonic()\n"
        "try:\n    load_tokenizer(ModelConfig(name_or_path='nobody/nothing'))\n"
        "except InputError as error:\n    print(error)\nprint(time.monotonic() - started)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    refusal, seconds = done.stdout.splitlines()
    assert refusal.startswith("model.name_or_path: no tokenizer could be loaded from 'nobody/nothing': ")
    assert float(seconds) < 15


def test_a_saved_tokenizer_keeps_its_tokens_for_a_model_type_with_a_tokenizer_class_of_its_own(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    AutoConfig.for_model("qwen2").save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(name_or_path=str(tmp_path)))
    assert loaded.get_vocab() == byte_tokenizer().get_vocab()


def test_a_folder_with_a_sentencepiece_model_alone_gives_that_models_ids(tmp_path: Path) -> None:
    lines = Path("README.md").read_text(encoding="utf-8").splitlines()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    text = "A façade:  two spaces, a tab\t, and\n  a line."
    expected = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text)
    loaded = load_tokenizer(ModelConfig(name_or_path=str(tmp_path)))
    assert loaded(text, add_special_tokens=False).input_ids == expected
    assert loaded.decode(expected) == text


def test_a_folder_with_a_tiktoken_model_alone_names_the_package_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_text("".join(f"{b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    with pytest.raises(InputError, match=r"model\.name_or_path: no tokenizer could be loaded from .*tiktoken"):
        load_tokenizer(ModelConfig(name_or_path=str(tmp_path)))


def test_a_chat_template_of_the_recipe_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    loaded = load_tokenizer(ModelConfig(preset={}, tokenizer="byte", chat_template=str(file)))
    text = loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "a</s>"
    loaded.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(ModelConfig(tokenizer=str(tmp_path / "saved"))).chat_template == file.read_text()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        ("{% for m in x %}", "chat.jinja, line 1: Unexpected end"),
        (" \n", "chat.jinja: expected a chat template, got an empty file"),
    ],
)
def test_a_chat_template_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None, problem: str) -> None:
    file = tmp_path / "chat.jinja"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=rf"^model\.chat_template: .*{problem}"):
        load_tokenizer(ModelConfig(preset={}, tokenizer="byte", chat_template=str(file)))
