"""Real inference engines behind `selfgen.generate_command`: they answer greedily as the run's own model does.

`make engine` installs vLLM for CPUs into an environment of its own, `.venv-engine`.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from selfgen_ds.config import ModelConfig, SelfgenConfig
from tests.distributed import runs
from tests.distributed.round_runs import TIMEOUT, drawn
from tests.ranks import ROOT, Ranks, free_port

ENGINE = ROOT / ".venv-engine" / "bin"
PLACES = "{model} {prompts} {answers}"
SMALL = "VLLM_CPU_KVCACHE_SPACE=1"  # GiB; vLLM takes much of the host's memory otherwise
STARTS_WITHIN = 270.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ENGINE / "vllm").exists(), reason="no .venv-engine with vLLM; `make engine` installs it"),
]


def offline() -> str:
    """Return the command that loads vLLM into a process."""
    return f"env {SMALL} {ENGINE}/python launch/vllm_answers.py {PLACES} --enforce_eager true"


def serving() -> str:
    """Return the command that starts vLLM's server and asks it."""
    port = free_port()
    # `vllm serve` of the package for CPUs looks for the metadata of the package `vllm`, and ends.
    serve = f"{ENGINE}/python -m vllm.entrypoints.openai.api_server --model {{model}}"
    server = f"{serve} --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager"
    url = f"http://127.0.0.1:{port}/v1"
    words = shlex.join(["--server", server, "--url", url])
    return f"env {SMALL} {ENGINE}/python launch/server_answers.py {PLACES} {words}"


COMMANDS = {"vllm": offline(), "server": serving()}


@pytest.mark.parametrize("engine", COMMANDS)
def test_an_engine_gives_the_answers_of_the_built_in_path(two_ranks: Ranks, folder: Path, engine: str) -> None:
    """With so small a `top_p`, the most probable token alone is drawn."""
    preset = runs.PRESET | {"hidden_size": 128, "num_attention_heads": 2, "initializer_range": 0.1}
    model = ModelConfig(name_or_path=runs.write_model(folder, **preset), dtype="float32")
    selfgen = SelfgenConfig(method="own_samples", top_p=1e-9, max_new_tokens=24)
    own = runs.recipe(folder, model=model, selfgen=selfgen)
    own.train.max_steps = 1
    two_ranks.run(runs.run_training, own, timeout=TIMEOUT)
    other = replace(own, output_dir=f"{own.output_dir}-{engine}")
    other.selfgen = replace(selfgen, generate_command=COMMANDS[engine])
    two_ranks.run(runs.run_training, other, timeout=STARTS_WITHIN)
    answers = [row["context_ids"] for row in drawn(own, "round-01")]
    assert len(set(map(tuple, answers))) == len(answers) == 40
    assert [row["context_ids"] for row in drawn(other, "round-01")] == answers
