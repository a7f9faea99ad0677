"""A command for `selfgen.generate_command` in tests, which answers with plain transformers or with letters.

    python -m tests.answering {model} {prompts} {answers} [MODE [FOLDER]]

MODE `model` (the default) answers greedily with the exported model. All others answer with the prompt's last letter and
an end token, and make a mistake if they are named for one. Every start appends the ids that it was asked for to
`FOLDER/asked`, one line for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main(model: str, prompts: str, answers: str, mode: str = "model", folder: str = "") -> None:
    """Answer the prompts, or not."""
    rows = [json.loads(line) for line in Path(prompts).read_text(encoding="utf-8").splitlines()]
    if folder:
        with open(Path(folder) / "asked", "a", encoding="utf-8") as file:
            file.write(" ".join(row["id"] for row in rows) + "\n")
    told = _of_model(model, rows) if mode == "model" else _letters(rows)
    with open(answers, "w", encoding="utf-8") as file:
        for number, answer in enumerate(told):
            if mode in ("crash", "hang") and number == 2:
                file.flush()
                _break(mode, Path(folder))
            if mode == "missing" and number == 1:
                continue
            if mode == "foreign" and number == 1:
                answer["id"] = "1000-0"
            for _ in range(2 if mode == "double" and number == 1 else 1):
                file.write(json.dumps(answer) + "\n")


def _letters(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    end = rows[0]["stop_token_ids"][0]
    return [{"id": row["id"], "token_ids": [row["prompt_token_ids"][-1], end]} for row in rows]


def _of_model(model: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    told = []
    for row in rows:
        prompt = torch.tensor([row["prompt_token_ids"]])
        ids = loaded.generate(
            prompt, do_sample=False, max_new_tokens=row["max_new_tokens"], eos_token_id=row["stop_token_ids"]
        )
        told.append({"id": row["id"], "token_ids": ids[0, prompt.shape[1] :].tolist()})
    return told


def _break(mode: str, folder: Path) -> None:
    """Fail with some last words, or wait for ever beside a process of this one's, whose ids go to `FOLDER/pids`."""
    if mode == "crash":
        print("loading the weights\nno memory is left", flush=True)
        sys.exit(7)
    child = subprocess.Popen(["sleep", "600"])
    (folder / "pids").write_text(f"{os.getpid()} {child.pid}", encoding="utf-8")
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
