"""The Hugging Face hub, which is asked once per process whether it can be reached."""

from __future__ import annotations

import functools
import logging

import datasets
from huggingface_hub import constants
from huggingface_hub.utils import get_session

log = logging.getLogger("selfgen_ds")


@functools.cache
def use_cache_without_network() -> None:
    """Make the hub's libraries use only their cache if the hub cannot be reached.

    Otherwise the libraries retry for most of a minute for every file.
    """
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # the HTTP client's exceptions, which are not part of the hub's interface
        log.warning("%s cannot be reached (%s): using only downloaded files", constants.ENDPOINT, error)
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
