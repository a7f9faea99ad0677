"""Answer the prompts of a round with vLLM, for `selfgen.generate_command`. docs/engines.md has the whole recipe.

    ENGINE/bin/python launch/vllm_answers.py {model} {prompts} {answers} [--NAME VALUE...]

Every further option is one of vLLM's `LLM`, such as `--gpu_memory_utilization 0.5` or `--tensor_parallel_size 8`; a
value is read as JSON if it is JSON. The script runs in the environment of vLLM, which has no need of selfgen_ds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

_GROUP = 2000  # prompts whose answers are written together: a killed round loses at most these


def main() -> None:
    """Answer all prompts, and write the answers as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "prompts", "answers"):
        parser.add_argument(name)
    paths, rest = parser.parse_known_args()
    longest = max(len(row["prompt_token_ids"]) + row["max_new_tokens"] for row in _rows(paths.prompts))
    with open(f"{paths.model}/config.json", encoding="utf-8") as file:
        dtype = json.load(file).get("dtype", "auto")  # vLLM's "auto" would take half of float32's bits
    options = {"max_model_len": longest, "dtype": dtype} | _options(parser, rest)

    from vllm import LLM, SamplingParams  # slow, and not needed to refuse an option

    llm = LLM(model=paths.model, **options)
    with open(paths.answers, "w", encoding="utf-8") as file:
        rows = _rows(paths.prompts)
        while group := list(islice(rows, _GROUP)):
            settings = [
                SamplingParams(
                    max_tokens=row["max_new_tokens"],
                    temperature=row["temperature"],
                    top_p=row["top_p"],
                    top_k=row["top_k"] or -1,
                    stop_token_ids=row["stop_token_ids"],
                    seed=row["seed"],
                    detokenize=False,
                )
                for row in group
            ]
            prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in group]
            for row, result in zip(group, llm.generate(prompts, settings), strict=True):
                file.write(json.dumps({"id": row["id"], "token_ids": list(result.outputs[0].token_ids)}) + "\n")
            file.flush()


def _rows(path: str) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _options(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, Any]:
    """Return `--name value` pairs as keyword arguments."""
    options = {}
    for name, text in zip(words[::2], [*words[1::2], ""], strict=False):
        if not name.startswith("--") or not text:
            parser.error(f"expected --NAME VALUE for an option of vllm.LLM, got {name} {text}")
        try:
            options[name.removeprefix("--").replace("-", "_")] = json.loads(text)
        except ValueError:
            options[name.removeprefix("--").replace("-", "_")] = text
    return options


if __name__ == "__main__":
    main()
