"""A step that hangs inside backward ends the run, with a line that says so and with the stack of the thread that hangs.

On a GPU, the backward runs in a thread of autograd, of which Python's list of threads knows nothing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from gpu_checks.commands import output_of, start
from gpu_checks.recipes import small_recipe
from gpu_checks.rows import Report
from selfgen_ds.config import TrainConfig, to_yaml

_GOOD_STEPS = 2


def check(report: Report) -> None:
    """Train until the third step, whose backward sleeps, and read what the run has printed at its end."""
    seconds = report.sizes.stall_seconds
    train = TrainConfig(max_steps=100, micro_batch_size=16, stall_seconds=seconds)
    recipe = small_recipe(report, train=train)
    (report.folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    log = report.folder / "train.log"
    program = ("-m", "gpu_checks.stalled_backward")
    process = start(log, "train", "--config", str(report.folder / "recipe.yaml"), program=program)
    code = process.wait()
    output = output_of(log)
    report.result("exit code of the stalled run", "1", str(code), code == 1)
    stalled = "no rank has made a forward for" in output
    report.result("the line that says so", "printed", "printed" if stalled else output[-500:], stalled)
    named = stuck_in_backward.__name__ in output
    report.result("the stack of the backward", "names what hangs", "named" if named else "not named", named)
    record = Path(recipe.output_dir) / "flight-record" / "rank_0"
    size = record.stat().st_size if record.exists() else 0
    report.result("torch's flight record", "written", f"{size} bytes", size > 0)


class _Stuck(torch.autograd.Function):
    """The identity, whose backward does not end."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        stuck_in_backward()
        return gradient


def stuck_in_backward() -> None:
    """Sleep longer than the check lasts. The stacks that a stalled run prints have this function's name."""
    time.sleep(3600)


def _train() -> None:
    """Run `selfgen-ds` with a loss whose backward hangs after some steps."""
    from selfgen_ds import cli
    from selfgen_ds.engine import step

    forwards, forward_losses = 0, step.forward_losses

    def hanging(*arguments: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal forwards
        forwards += 1
        loss, router_loss = forward_losses(*arguments, **settings)
        return (_Stuck.apply(loss) if forwards > _GOOD_STEPS else loss), router_loss

    step.forward_losses = hanging
    cli.main()


if __name__ == "__main__":
    _train()
