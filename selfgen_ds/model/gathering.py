"""Gather ZeRO-3's weights once for many forwards without a gradient, if they fit into the memory that is free.

A sharded model gathers every layer for every forward, and so for every token of an answer. With gathered weights, each
rank has a plain model, and the ranks need not run the same number of forwards.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from selfgen_ds.model.budget import cache_bytes, one_token_cache, row_bytes, token_bytes
from selfgen_ds.ranks import process_group

log = logging.getLogger("selfgen_ds")


class GatherableModel:
    """A model whose weights can be gathered for a while if ZeRO-3 shards them.

    Args:
        forward: A model with reductions (`selfgen_ds.model.reductions.add_reductions`), or the DeepSpeed engine of one.
        rows_at_once: The most rows that a rank generates at the same time.
    """

    def __init__(self, forward: DeepSpeedEngine | PreTrainedModel, rows_at_once: int) -> None:
        self.forward = forward
        self.model: PreTrainedModel = forward.module if isinstance(forward, DeepSpeedEngine) else forward
        self.rows_at_once = rows_at_once
        """The most rows to generate at the same time now: fewer inside `gathered` if memory is short."""
        self.device = torch.device(forward.device)
        self.sharded = isinstance(forward, DeepSpeedEngine) and forward.zero_optimization_partition_weights()
        """Whether a forward gathers weights now, so that all ranks must run the same forwards."""
        self.generated_tokens = 0
        """Tokens of the answers since `gathered` was entered."""
        self.generation_seconds = 0.0
        """Time that these tokens took."""
        self.read_tokens = 0
        """Tokens that this rank has read without gradients so far, for draws and answers, without padding."""
        self._inside_gathered = False
        self._spare_bytes = math.inf
        """Memory that one forward may take inside `gathered`."""
        self._token_bytes = token_bytes(self.model.config, self.model.dtype.itemsize)
        self._one_token_cache: Cache | None = None
        self._gathered_before: bool | None = None
        """Whether the previous `gathered` gathered sharded weights; None before the first."""

    @contextmanager
    def gathered(self, longest: int) -> Iterator[None]:
        """Gather sharded weights once for all forwards inside, if memory allows.

        The weights are gathered if they and the working memory of at least one row fit into the free memory of every
        rank, and if they are not offloaded to disk. Otherwise they stay sharded, and the ranks run the same forwards.
        In both cases `rows_at_once` is limited to the rows that fit. A nested call changes nothing. Collective: every
        rank must call this, because the ranks decide together.

        Args:
            longest: Tokens of the longest row, prompt and answer together.
        """
        if self._inside_gathered:
            yield
            return
        sharded, rows_at_once = self.sharded, self.rows_at_once
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.forward))
            offload = self.forward.optimizer.parameter_offload if sharded else None
            row = self._row_bytes(longest)
            if offload is not None:
                offload.partition_all_parameters()  # memory of weights that are gathered now counts as free
                # A forward without a backward leaves gathers in flight, which nothing else may gather again.
                stack.callback(offload.partition_all_parameters)
            gathers, rows = self._choose(row)
            announced = sharded and gathers != self._gathered_before
            self._gathered_before = gathers
            if gathers:
                stack.enter_context(gathered_weights(offload))
            self.sharded, self.rows_at_once, self._inside_gathered = sharded and not gathers, rows, True
            self.generated_tokens, self.generation_seconds = 0, 0.0
            try:
                yield
            finally:
                self.sharded, self.rows_at_once = sharded, rows_at_once
                self._inside_gathered, self._spare_bytes = False, math.inf
        if announced and self.generated_tokens:
            tokens, seconds = self.generated_tokens, self.generation_seconds
            told = "generation: this rank generated %d tokens in %.1f s, %.0f tokens per second"
            log.info(told, tokens, seconds, tokens / seconds)

    def _choose(self, row: int) -> tuple[bool, int]:
        """Decide whether to gather sharded weights, and how many rows to generate at once.

        Collective if the weights are sharded: the ranks get the same result. The choice and its reasons are logged if
        the choice differs from the previous one.

        Args:
            row: Memory to generate one row, in bytes.
        """
        weights, live = self._weight_bytes() if self.sharded else (0, 0)
        free = free_bytes()
        usable = 0.9 * free  # a tenth is left for memory that is not counted here
        rows = self._fitting_rows(usable - weights, row)
        gathers = self.sharded and rows >= 1 and not self._on_disk()
        if self.sharded and not gathers:
            rows = self._fitting_rows(usable - live, row)
        self._spare_bytes = usable - (weights if gathers else live)
        rows = max(1, min(self.rows_at_once, rows))
        if self.sharded and gathers != self._gathered_before:
            how = "are gathered once" if gathers else "stay sharded and are gathered again for every token or pass"
            told = "generation: weights of %.1f MB %s; %d rows at once, each %.1f MB; %.1f MB free"
            log.info(told, weights / 1e6, how, rows, row / 1e6, free / 1e6)
        return gathers, rows

    def _weight_bytes(self) -> tuple[int, int]:
        """Return the bytes of all sharded weights, and of the weights that ZeRO-3 holds gathered at the same time."""
        weights = sum(p.ds_numel * p.element_size() for p in self.model.parameters())
        return weights, min(weights, self.forward.zero_max_live_parameters() * self.model.dtype.itemsize)

    def _fitting_rows(self, available: float, row: int) -> int:
        """Return the rows that fit into `available` bytes on every rank. Collective if the weights are sharded."""
        rows = int(available // row)
        return -self.max_over_ranks(-rows) if self.sharded else rows

    def _on_disk(self) -> bool:
        """Return whether sharded weights are offloaded to disk.

        DeepSpeed reads these weights into a few buffers, which cannot hold all weights at once.
        """
        offload = self.forward.zero_offload_param()
        return offload is not None and offload.device == OffloadDeviceEnum.nvme

    def _row_bytes(self, longest: int) -> int:
        """Return the bytes to generate one row of `longest` tokens. Collective if the weights are sharded."""
        if self._one_token_cache is None:
            # In training mode, a model with activation checkpointing keeps no cache.
            with evaluating(self.forward):
                self._one_token_cache = one_token_cache(self.model)
        cache = cache_bytes(self._one_token_cache, longest)
        return cache + row_bytes(self.model.config, self.model.dtype.itemsize, longest)

    def _most_tokens(self) -> float:
        """Return the tokens that one forward may read: inside `gathered` as many as fit, otherwise any number."""
        return max(0.0, self._spare_bytes) / self._token_bytes

    @property
    def _module(self) -> nn.Module:
        """The module to call for a forward: the model itself while the engine's hooks are off."""
        return self.model if self._inside_gathered and not self.sharded else self.forward

    def max_over_ranks(self, value: int) -> int:
        """Return the largest of the ranks' values. Collective: every rank must call this."""
        return process_group.max_over_ranks([value])[0] if dist.is_initialized() else value


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and activation checkpointing off inside, and restore the module's mode afterwards."""
    # An engine's own mode may differ from the mode of its model.
    training = module.module.training if isinstance(module, DeepSpeedEngine) else module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def gathered_weights(offload: Any) -> Iterator[None]:
    """Gather all weights of a ZeRO-3 model and take ZeRO-3's hooks off, so that each rank has a plain model inside.

    No weight may be gathered yet. Afterwards the weights are sharded again, and every hook is back at its old position,
    even after an exception: the recorded order of modules stays valid. The root module's hook is taken off too, because
    with it the ranks would have to run the same number of forwards. Collective: every rank must enter and leave this.

    Args:
        offload: The engine's `optimizer.parameter_offload`.
    """
    handles = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
    tables = {id(hooks): hooks for hooks in (handle.hooks_dict_ref() for handle in handles)}
    before = [(hooks, dict(hooks)) for hooks in tables.values()]
    with deepspeed.zero.GatheredParameters(offload.module.parameters()):
        try:
            for handle in handles:
                handle.remove()
            yield
        finally:
            for hooks, saved in before:
                hooks.clear()
                hooks.update(saved)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity; 30 times as fast on the CPU as `isfinite().all()`."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def gather_copy(tensor: Tensor, keep: bool) -> Tensor | None:
    """Return a copy of a full tensor on the host; None on a rank that does not keep it.

    Collective if the tensor is partitioned: every rank must call this.
    """
    with deepspeed.zero.GatheredParameters([tensor]):  # does nothing for a tensor that is not partitioned
        return tensor.detach().to("cpu", copy=True) if keep else None


def free_bytes() -> int:
    """Return the bytes that this rank may take now: free memory of its accelerator, or its share of the host's."""
    get_accelerator().empty_cache()
    if get_accelerator().device_name() == "cuda":
        # DeepSpeed's figure counts what this process has allocated alone, and not what the driver, NCCL and other
        # processes hold.
        return torch.cuda.mem_get_info()[0]
    free = get_accelerator().available_memory()
    return free // process_group.local_world_size() if get_accelerator().device_name() == "cpu" else free
