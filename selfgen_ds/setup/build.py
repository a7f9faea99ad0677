"""The recipe's model under DeepSpeed, and the policy through which methods see it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.utils import set_z3_leaf_modules_by_name
from transformers import PretrainedConfig, PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from selfgen_ds.checkpoint.source import compare_with_source
from selfgen_ds.config import Recipe
from selfgen_ds.engine import ds_config
from selfgen_ds.engine.initialize import initialize, warm_up
from selfgen_ds.model import lora
from selfgen_ds.model.budget import sweep_budget
from selfgen_ds.model.generation import Sharing
from selfgen_ds.model.loading import build_model, checkpoint_activations, vocabulary, warn_of_rounding
from selfgen_ds.model.policy import EnginePolicy, Sampling
from selfgen_ds.model.probe import Traits
from selfgen_ds.model.reach import freeze
from selfgen_ds.ranks import process_group
from selfgen_ds.ranks.agreement import raise_on_all_ranks


def build_engine(
    recipe: Recipe,
    json_config: dict[str, Any],
    config: PretrainedConfig,
    traits: Traits,
    tokenizer: PreTrainedTokenizerBase,
    total_steps: int,
) -> tuple[DeepSpeedEngine, HfDeepSpeedConfig]:
    """Build the recipe's model under DeepSpeed, with a valid ZeRO-3 trace. Collective: every rank must call this.

    Returns:
        The engine, and the configuration that transformers holds by a weak reference only: the caller must keep it.

    Raises:
        InputError: The model's weights cannot be read.
    """
    hidden_size = config.get_text_config(decoder=True).hidden_size
    hf_config = ds_config.resolve(recipe, json_config, dist.get_world_size(), hidden_size)
    process_group.leave_node_group()
    set_seed(recipe.seed)
    with raise_on_all_ranks():
        model = build_model(recipe.model, config, traits.logit_transform, vocabulary(tokenizer))
        if recipe.model.name_or_path is not None:
            compare_with_source(model, recipe.model.name_or_path, reads=dist.get_rank() == 0)
        freeze(model, traits.reach.unreached(model))
        set_z3_leaf_modules_by_name(model, traits.reach.routing_modules(model))
        if recipe.model.lora is not None:
            set_seed(recipe.seed)
            lora.add_adapter(model, recipe.model.lora, str(recipe.model.name_or_path))
            lora.log_left_out(model)
    set_seed(recipe.seed + dist.get_rank())
    if recipe.train.activation_checkpointing:
        checkpoint_activations(model, ds_config.offloads_activations(json_config))
    engine = initialize(model, hf_config.config, recipe.optim, total_steps)
    warn_of_rounding(engine.module)
    warm_up(engine)
    return engine, hf_config


def engine_policy(
    recipe: Recipe, engine: DeepSpeedEngine, end_tokens: list[int], sharing: Sharing = "any"
) -> EnginePolicy:
    """Return the policy that draws from the engine's model.

    Args:
        end_tokens: Token ids, each of which ends an answer.
        sharing: Which prompts may share a batch.
    """
    prefetched = 0  # elements that ZeRO-3 gathers ahead of a forward
    if engine.zero_optimization_stage() == 3:
        size = sum(p.ds_numel for p in engine.module.parameters())
        prefetched = min(int(engine.zero_prefetch_bucket_size()), size)
    return EnginePolicy(
        engine,
        end_tokens=end_tokens,
        sampling=Sampling.of(recipe.selfgen),
        budget=sweep_budget(
            engine.module.config,
            recipe.train.activation_checkpointing,
            prefetched,
            recipe.data.max_length if recipe.data.packing else None,
            adapted=recipe.model.lora is not None,
            offloaded=ds_config.offloads_activations(engine.config),
        ),
        generation_batch_size=recipe.selfgen.generation_batch_size,
        sharing=sharing,
    )
