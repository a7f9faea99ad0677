"""The machine: versions, collectives of one rank, and the memory that is free."""

from __future__ import annotations

import json
from importlib.metadata import version

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from gpu_checks.rows import Report
from selfgen_ds.model.gathering import free_bytes
from selfgen_ds.ranks import process_group
from selfgen_ds.scaling.environment import environment, hardware
from selfgen_ds.versions import versions

_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy", "pyarrow")
_GIB = 1 << 30


def check(report: Report) -> None:
    """Check that this process can be a rank of a run on this machine."""
    process_group.init_process_group()
    record = environment() | {"packages": versions() | {name: version(name) for name in _PACKAGES}}
    (report.all_checks / "environment.json").write_text(json.dumps(record), encoding="utf-8")
    report.shown("accelerator", str(hardware()["accelerator"]))
    report.shown("versions", ", ".join(f"{name} {version(name)}" for name in _PACKAGES[:3]))
    _collectives(report)
    if report.device == "cuda":
        _free_memory(report)
    else:
        report.skipped("free memory", "a CPU has no mem_get_info")


def _collectives(report: Report) -> None:
    """Collective: a group of one rank, which is all that one GPU allows."""
    backend, expected = dist.get_backend(), "nccl" if report.device == "cuda" else "gloo"
    report.result("backend", expected, backend, backend == expected)
    gathered = process_group.all_gather_object({"rank": 0})
    report.result("all_gather_object", "[{'rank': 0}]", str(gathered), gathered == [{"rank": 0}])
    given = process_group.from_rank_0(lambda: "given")
    report.result("broadcast_object_list", "given", given, given == "given")
    total = torch.ones(1, device=process_group.device())
    dist.all_reduce(total)
    dist.barrier()
    report.result("all_reduce and barrier", "1", f"{total.item():g}", total.item() == 1)


def _free_memory(report: Report) -> None:
    before = free_bytes()
    kept = torch.empty(_GIB, dtype=torch.uint8, device=process_group.device())
    after = free_bytes()
    taken = (before - after) / len(kept)
    report.result("free memory that a tensor of 1 GiB takes", "0.95 to 1.1 GiB", f"{taken:.3f} GiB", 0.95 < taken < 1.1)
    free, total = torch.cuda.mem_get_info()
    report.shown("memory", f"{free / _GIB:.2f} of {total / _GIB:.2f} GiB free, ours {after / _GIB:.2f}")
    theirs = get_accelerator().available_memory()
    report.shown("free memory as DeepSpeed says it", f"{theirs / _GIB:.2f} GiB")
