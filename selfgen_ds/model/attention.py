"""The attention implementations of transformers, by their names there: which can run here, and which need a mask."""

from __future__ import annotations

from transformers.integrations.hub_kernels import is_kernel
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_kernels_available

_FLASH = {
    f"flash_attention_{version}": facts["general_availability_check"]
    for version, facts in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items()
}
"""Name -> a function that tells whether the package is installed, and a device is there that it runs on."""
FLEX = "flex_attention"


def is_flash(name: str) -> bool:
    """Return whether an implementation is flash attention of any version, also as a kernel of the hub."""
    return is_flash_attention_requested(requested_attention_implementation=name)


def masks_packed_rows(name: str) -> bool:
    """Return whether packed rows need a mask with an entry for each pair of positions, which also rules out sdpa's
    fast kernels. Flash attention takes the samples' boundaries instead, and flex attention blocks of positions.
    """
    return not is_flash(name) and name != FLEX


def problem(name: str, on_cpu: bool, trains: bool) -> str:
    """Return why an implementation cannot run here; empty if it can, as far as one knows before a model is built.

    Args:
        name: One of transformers' names, such as `flash_attention_3`; a name that the user's code has registered; or a
            kernel of the hub, such as `kernels-community/flash-attn2`.
        on_cpu: Whether the model is on the CPU.
        trains: Whether the model is trained.
    """
    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)]
    if is_kernel(name):
        return "" if is_kernels_available() else "a kernel of the hub needs the package kernels"
    if name not in known:
        return f"expected one of {', '.join(sorted(known))}, or a kernel of the hub as OWNER/NAME, got {name!r}"
    if name in _FLASH and (on_cpu or not (_FLASH[name]() or is_kernels_available())):
        return f"{name} needs a GPU, and its package or the package kernels, which fetches it from the hub"
    if name == FLEX and on_cpu and trains:
        return "flex_attention cannot be trained on a CPU, where torch has no backward of it"
    return ""
