"""What does a run of each method train? The plan that ``fedblocks init`` writes; clients know it, never the method.

Source: docs/methods.md, methods.md 11.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from typing_extensions import assert_never

from fedblocks.profiles.units import (
    EXPANDED_BLOCKS,
    BaseTensors,
    ExpandedBlocks,
    LowRankPairs,
    PersonalPairs,
    Trainable,
)
from fedblocks.protocol.expansion import (
    ExpansionError,
    ExpansionPlan,
    plan_expansion,
    plan_trainable,
    shape_from_config,
)
from fedblocks.protocol.run_config import ConfigError, RunConfig


def plan_of(config: RunConfig, *, base_hash: str, model_config: Mapping[str, Any]) -> ExpansionPlan:
    """The plan of a run with this configuration on the base whose ``config.json`` this is. A pure function.

    Raises:
        ExpansionError: the model cannot be used, or not with so many blocks.
        ConfigError: what the configuration wants to train does not fit the model.
    """
    shape = shape_from_config(model_config)
    trainable = trainable_of(config, shape.num_layers)
    if isinstance(trainable, ExpandedBlocks):
        return plan_expansion(
            base_hash=base_hash,
            config=model_config,
            placement=config.expansion.placement,
            num_blocks=config.most_blocks,
        )
    if shape.encoder and not isinstance(trainable, PersonalPairs):
        raise ConfigError(
            f"run.method is {config.run.method!r}, which trains decoders only; what works for this encoder "
            f"(model_type {model_config.get('model_type')!r}): fedbe, llamapro or fedhft"
        )
    try:
        return plan_trainable(base_hash=base_hash, config=model_config, trainable=trainable)
    except ExpansionError as error:
        raise ConfigError(f"section [trainable] of run.toml: {error}") from error


def trainable_of(config: RunConfig, num_layers: int) -> Trainable:
    """What a run with this configuration trains on a model of this depth.

    Raises:
        ConfigError: more layers than there are.
    """
    match config.run.method:
        case "fedbe" | "llamapro":
            return EXPANDED_BLOCKS
        case "fedavg" | "fedprox":
            return BaseTensors(layers=tuple(range(num_layers)), tables=True)
        case "topn":
            wanted = config.trainable.top_layers
            if wanted > num_layers:
                raise ConfigError(
                    f"trainable.top_layers is {wanted}, expected at most the {num_layers} layers of the model"
                )
            return BaseTensors(layers=tuple(range(num_layers - wanted, num_layers)), tables=False)
        case "fedit" | "hetlora" | "flexlora" | "flora":
            return LowRankPairs(
                rank=config.trainable.rank,
                scaling=config.trainable.scaling,
                targets=config.trainable.targets,
                seed=config.run.seed,
                merged=config.run.method == "flora",
            )
        case "fedhft":
            return PersonalPairs(
                rank=config.trainable.rank,
                scaling=config.trainable.scaling,
                targets=config.trainable.targets,
                seed=config.run.seed,
                prior_rank=config.trainable.prior_rank,
            )
        case _:
            assert_never(config.run.method)


def check_plan(config: RunConfig, plan: ExpansionPlan) -> None:
    """Refuses a configuration that wants to train something else than the run folder was made for.

    Raises:
        ConfigError: with what the plan trains, and what the configuration says.
    """
    wanted = trainable_of(config, plan.shape.num_layers)
    if isinstance(wanted, LowRankPairs) and isinstance(plan.trainable, LowRankPairs):
        wanted = replace(wanted, seed=plan.trainable.seed)  # another order of the data needs no other start
    if wanted != plan.trainable:
        raise ConfigError(
            f"run.method is {config.run.method!r}, with section [trainable], which is not what this run was made for: "
            f"its plan trains {plan.trainable_text()}; make another run: fedblocks init --method {config.run.method}"
        )
