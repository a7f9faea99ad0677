"""A checksum of a model's weights, which tells whether two runs have the same weights."""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist

from selfgen_ds import hashing

_PIECE = 1 << 22  # elements hashed at once
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_checksum(engine: deepspeed.DeepSpeedEngine) -> str:
    """Return a checksum of 64 bits, in hexadecimal, that does not depend on the number of ranks.

    The checksum is the sum of a hash of every element and its position. Ranks share the elements of each parameter, in
    pieces of `_PIECE` elements. Under ZeRO-3 every parameter is gathered once. Collective: every rank must call this.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if engine.zero_optimization_stage() == 3:
        # A parameter whose gather is in flight cannot be gathered.
        engine.optimizer.parameter_offload.partition_all_parameters()
    total = torch.zeros((), dtype=torch.int64, device=engine.device)
    for number, parameter in enumerate(engine.module.parameters()):
        with deepspeed.zero.GatheredParameters([parameter]):
            bits = parameter.detach().flatten().view(_BITS[parameter.itemsize])
            for first in range(rank * _PIECE, len(bits), world_size * _PIECE):
                piece = bits[first : first + _PIECE].long()
                positions = torch.arange(first, first + len(piece), device=piece.device)
                total += hashing.bits(number, positions, piece).sum()
    dist.all_reduce(total)
    return f"{int(total) & (1 << 64) - 1:016x}"
