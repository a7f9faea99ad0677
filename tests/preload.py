"""What ranks have imported when they are forked."""

import os

from tests.ranks import ENVIRONMENT

os.environ |= ENVIRONMENT  # read by what follows

import selfgen_ds.train  # noqa: F401
