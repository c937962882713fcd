"""What does a run of each method train? The plan that ``fedblocks init`` writes; clients know it, never the method.

Source: docs/methods.md, methods.md 11.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import assert_never

from fedblocks.profiles.units import BaseTensors, LowRankPairs, Trainable
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
    match config.run.method:
        case "fedbe" | "llamapro":
            return plan_expansion(
                base_hash=base_hash,
                config=model_config,
                placement=config.expansion.placement,
                num_blocks=config.most_blocks,
            )
        case _ if shape_from_config(model_config).encoder:
            raise ConfigError(
                f"run.method is {config.run.method!r}, which trains decoders only; what works for this encoder "
                f"(model_type {model_config.get('model_type')!r}): fedbe or llamapro"
            )
        case "fedavg" | "fedprox":
            layers = shape_from_config(model_config).num_layers
            trainable: Trainable = BaseTensors(layers=tuple(range(layers)), tables=True)
        case "topn":
            layers, wanted = shape_from_config(model_config).num_layers, config.trainable.top_layers
            if wanted > layers:
                raise ConfigError(
                    f"trainable.top_layers is {wanted}, expected at most the {layers} layers of the model"
                )
            trainable = BaseTensors(layers=tuple(range(layers - wanted, layers)), tables=False)
        case "fedit" | "hetlora" | "flexlora" | "flora":
            trainable = LowRankPairs(
                rank=config.trainable.rank,
                scaling=config.trainable.scaling,
                targets=config.trainable.targets,
                seed=config.run.seed,
                merged=config.run.method == "flora",
            )
        case _:
            assert_never(config.run.method)
    shape_from_config(model_config)  # what is wrong with the model itself is said as such
    try:
        return plan_trainable(base_hash=base_hash, config=model_config, trainable=trainable)
    except ExpansionError as error:
        raise ConfigError(f"section [trainable] of run.toml: {error}") from error
