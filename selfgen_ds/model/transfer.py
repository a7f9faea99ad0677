"""Data on its way from the host to the device and back.

Batches, masks, and noise stay on the host, where it takes no waiting to look at them; a forward gets what it reads from
`to_device`. An accelerator works behind the host, which has to wait for it wherever a result is looked at: in a step,
that is in `to_host` alone, and in the collectives by which the ranks decide something together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device. An accelerator copies it when its turn comes, and the host goes on."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor of a device on the host, which waits until the device has computed it."""
    return tensor.cpu()
