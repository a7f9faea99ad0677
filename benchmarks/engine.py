"""Time of a round whose answers an inference engine gives, compared with the run's own path, on the same prompts.

    make engine
    python benchmarks/engine.py --model MODEL --data rows.jsonl --output runs/engine.json

Runs `selfgen-ds train` for one step of `own_samples`, on one rank, three times: on its own, with vLLM for CPUs, and
with vLLM on the first row alone, whose time is mostly vLLM's start. The times are those of `round.json`: for the engine
they include the export of the model. Decoding is greedy, and the answers that are equal are counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from selfgen_ds.files import as_json
from selfgen_ds.ranks import process_group
from selfgen_ds.rounds.store import load_table
from selfgen_ds.scaling.environment import environment

ROOT = Path(__file__).parent.parent
COMMAND = (
    f"env VLLM_CPU_KVCACHE_SPACE=2 {ROOT}/.venv-engine/bin/python {ROOT}/launch/vllm_answers.py "
    "{model} {prompts} {answers} --enforce_eager true"
)


def main() -> None:
    """Run the rounds, and write and print their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = folder / "first.jsonl"
        first.write_text(Path(given.data).read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
        own, answers = _round(given, given.data, folder / "own")
        engine, others = _round(given, given.data, folder / "engine", "--selfgen.generate_command", COMMAND)
        start, _ = _round(given, str(first), folder / "start", "--selfgen.generate_command", COMMAND)
    process_group.init_process_group()  # after the runs, which would take its variables for a launcher's
    result = {
        "environment": environment(),
        "rows": len(answers),
        "equal_answers": sum(a == b for a, b in zip(answers, others, strict=True)),
        "own_s": own,
        "engine_s": engine,
        "engine_start_s": start,
        "own_divided_by_engine": own / engine,
    }
    Path(given.output).parent.mkdir(parents=True, exist_ok=True)
    Path(given.output).write_text(as_json(result) + "\n", encoding="utf-8")
    print(as_json(result))
    process_group.leave_process_group()


def _round(given: argparse.Namespace, data: str, folder: Path, *options: str) -> tuple[float, list[Any]]:
    """Train for one step, and return the seconds of its round and the rows' tokens."""
    settings = {
        "output_dir": str(folder),
        "deepspeed": "zero3_cpu",
        "model.name_or_path": given.model,
        "model.dtype": "float32",
        "data.train": data,
        "data.max_length": "512",
        "selfgen.method": "own_samples",
        "selfgen.top_k": "1",
        "selfgen.max_new_tokens": str(given.max_new_tokens),
        "train.max_steps": "1",
        "train.micro_batch_size": "1",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    subprocess.run([sys.executable, "-m", "selfgen_ds", "train", *words, *options], check=True, cwd=ROOT)
    drawn = folder / "rollouts" / "round-01"
    seconds = json.loads((drawn / "round.json").read_text(encoding="utf-8"))["seconds"]
    return seconds, [row["context_ids"] for row in load_table(drawn).with_format(None)]


if __name__ == "__main__":
    main()
