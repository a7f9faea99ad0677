"""Do all imports of a run before ranks are forked, so that no rank does them again."""

import gc
import os

from tests.ranks import ENVIRONMENT

os.environ |= ENVIRONMENT  # the following imports read these variables

import deepspeed.module_inject.auto_ep_layer  # an engine imports this and the next one
import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401
import torch.utils.tensorboard  # noqa: F401 (the metrics logger does)
import transformers.models.llama.modeling_llama  # noqa: F401

import selfgen_ds.train  # noqa: F401
from selfgen_ds import cli
from selfgen_ds.engine import initialize

initialize.import_muon()
cli._parser()  # which is kept, and takes every rank a third of a second

gc.freeze()  # DeepSpeed collects garbage for every engine, which would take a second over these modules' objects
