"""The command line refuses rounds of another run, and a cue that a chat template swallows, in one clear line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.rounds.store import read_audit
from tests.chat_tokenizers import CHATML, build
from tests.distributed import runs
from tests.forked import command


def train(folder: Path, *overrides: str) -> tuple[int, list[str]]:
    """Run `selfgen-ds train`; return its exit code and its error lines."""
    (folder / "recipe.yaml").write_text(runs.YAML.format(folder=folder))
    code = command(["train", "--config", str(folder / "recipe.yaml"), *overrides], folder / "log")
    output = (folder / "log").read_text()
    assert "Traceback" not in output
    return code, [line for line in output.splitlines() if line.startswith("selfgen-ds: error: ")]


def refused(folder: Path, *overrides: str) -> str:
    """Return the only error line of a run that ends with exit code 2 before its first step."""
    code, lines = train(folder, *overrides)
    assert code == 2, (folder / "log").read_text()[-3000:]
    assert not (folder / "run" / "metrics.jsonl").exists()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("selfgen-ds: error: ")


@pytest.mark.slow
def test_rounds_from_another_model_tokenizer_data_set_or_method_are_refused(folder: Path) -> None:
    runs.write_rows(folder, 8)  # 4 steps per round
    bash = ("--selfgen.method", "bash")
    assert train(folder, *bash, "--output_dir", str(folder / "first"))[0] == 0, (folder / "log").read_text()[-3000:]
    store = folder / "first" / "rollouts"
    fingerprint = read_audit(store / "round-01")["fingerprint"]

    (folder / "other.jsonl").write_text((folder / "rows.jsonl").read_text().replace("row 1:", "row A:"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "tokenizer")
    sharing = (*bash, "--selfgen.rollouts", str(store))
    for what, other in {
        "model": ("--seed", "1"),
        "tokenizer": ("--model.tokenizer", str(folder / "tokenizer")),
        "data": ("--data.train", str(folder / "other.jsonl")),
    }.items():
        line = refused(folder, *sharing, *other)
        origin = {"model": "starting model"}.get(what, what)
        refusal = re.fullmatch(
            rf"selfgen.rollouts: {store}/round-01 was drawn from another {origin}: expected (\w+), got (\w+)", line
        )
        assert refusal, line
        assert refusal[2] == fingerprint[what] != refusal[1]
    line = refused(folder, "--selfgen.method", "rac", *sharing[2:])
    assert line == f"selfgen.rollouts: {store / 'round-01'} was drawn by bash, not by rac"
    line = refused(folder, *bash, "--selfgen.rollouts", str(folder / "none"))
    assert line == f"selfgen.rollouts: expected an existing folder, another run's `rollouts`, got '{folder / 'none'}'"
    line = refused(folder, *bash, "--selfgen.rollouts", str(folder / "first"))
    assert line.startswith(f"selfgen.rollouts: {folder / 'first'} holds no complete round")

    assert train(folder, *sharing, "--selfgen.replace_probability", "0.9", "--train.max_steps", "5")[0] == 0, (
        "what was refused leaves a folder behind that a run can start in"
    )
    log = (folder / "log").read_text()
    assert f"{store / 'round-01'} was drawn with other settings: replace_probability was 0.5 and is now 0.9" in log
    assert f"{store} holds no round-02; drawing it here" in log
    assert [path.name for path in (folder / "run" / "rollouts").glob("round-*")] == ["round-02"]
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    probabilities = [row["replace_probability"] for row in metrics]
    assert probabilities == [0.5] * 4 + [0.9]  # the round that is read keeps its own probability
    read = json.loads((store / "round-01" / "round.json").read_text())
    drawn = json.loads((folder / "run" / "rollouts" / "round-02" / "round.json").read_text())
    costs = [(read["counts"]["no_grad_tokens"], read["seconds"]), *[(0, 0.0)] * 3]
    costs.append((drawn["counts"]["no_grad_tokens"], drawn["seconds"]))
    assert [(row["no_grad_tokens"], row["round_time_s"]) for row in metrics] == costs  # whichever run has drawn it
    assert costs[0] > (0, 0.0) < costs[4]

    shutil.rmtree(store)
    resume = ("--resume", "auto", "--output_dir", str(folder / "first"), "--train.max_steps", "3")
    assert train(folder, *bash, *resume)[0] == 0
    assert (
        f"{store / 'round-01'} no longer exists; drawing it again with the weights of step"
        in (folder / "log").read_text()
    )


def test_a_cue_that_the_chat_template_swallows_is_one_clear_line(folder: Path) -> None:
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 4)
    content = "{% if loop.index0 != 2 %}{{ m['content'] }}{% endif %}"
    template = f"{{% for m in messages %}}<|im_start|>{content}<|im_end|>{{% endfor %}}"
    build(template, "byte_level", ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>").save_pretrained(folder / "chat")
    line = refused(folder, "--selfgen.method", "rac", "--model.tokenizer", str(folder / "chat"))
    assert line.startswith("selfgen.cue")
    assert "leaves out the content of message 3" in line
