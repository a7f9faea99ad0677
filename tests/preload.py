"""What ranks have imported when they are forked."""

import os

from tests.ranks import ENVIRONMENT

os.environ |= ENVIRONMENT  # read by what follows

import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 (an engine does, and with it torch's compiler)

import selfgen_ds.train  # noqa: F401
