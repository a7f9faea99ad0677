"""The Hugging Face hub, asked once whether it is there."""

from __future__ import annotations

import functools
import logging

import datasets
from huggingface_hub import constants
from huggingface_hub.utils import get_session

log = logging.getLogger("selfgen_ds")


@functools.cache
def use_cache_without_network() -> None:
    """Where the hub cannot be reached, let its libraries use what they have in their cache.

    Left to themselves they try again for most of a minute, for every file.
    """
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # the client's own types, which are no part of the hub's interface
        log.warning("%s cannot be reached (%s): only what was downloaded before is used", constants.ENDPOINT, error)
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
