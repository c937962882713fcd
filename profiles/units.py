"""Which units does a run train, and which tensors does each of them have?

A *unit* is what is assigned, uploaded, folded and published as one and under one number. What a run's units are is a
closed list, :data:`Trainable`:

==============  ==================================================================================================
ExpandedBlocks  unit = an expanded block, all of its tensors; a width is a slim block (methods.md 3)
LowRankPairs    unit = a base layer, a pair A, B for each of its target linears; a width is the first components
PersonalPairs   the same pairs, of which a width is a share of B's rows, over a frozen prior of the client's own
MergedLinears   unit = a base layer, the whole weights of its target linears: what merged pairs have changed
BaseTensors     unit = a base layer, all of its tensors; and one unit (:attr:`BaseTensors.tables`) for the embedding,
                the final norm and the head
==============  ==================================================================================================

Beside them a run may have one :class:`NamedTensors`, e.g. a classification head: the unit :data:`EXTRA_UNIT`, which has
no width. A :class:`ModelShape` alone stands for expanded blocks and nothing else; it answers for a block of any number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, get_args

from typing_extensions import assert_never

from fedblocks.profiles.model_shape import WIDTHS, ChosenRows, ModelShape, TensorSpec

Targets = Literal["all", "qv"]
"""Which linears get a pair: every projection, or those of the queries and of the values (the choice of LoRA, Hu et al.,
2106.09685)."""

#: The number of the named extra tensor set; a model has fewer layers and a run fewer blocks.
EXTRA_UNIT: Final = 65535

#: Between the numbers of one unit in two clusters of clients (``aggregator/personalisation.py``): the copies of a unit
#: have its tensors. Such numbers are never on the wire.
CLUSTER_STRIDE: Final = 1 << 17

#: Last parts of the names of query and value projections, of all families.
QUERY_VALUE: Final = ("q_proj", "v_proj", "query", "value")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandedBlocks:
    """The blocks of an expansion plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankPairs:
    """``y += scaling · (x Aᵀ) Bᵀ`` over target linears of every base layer, A ``[r, in]``, B ``[out, r]``.

    The scaling is alpha / r and the same for every rank, so that the first components of a pair mean the same whoever
    trains them.

    Raises:
        ValueError: a rank below 1, a scaling that is not positive, or unknown targets.
    """

    rank: int
    """r_max: the rank of width 1."""
    scaling: float = 2.0
    """alpha / r."""
    targets: Targets = "all"
    seed: int = 1
    """Of the initial A (``protocol/initial_pairs.py``); B starts at zero."""
    merged: bool = False
    """Every round starts from fresh pairs; what they learn is added to the weights (:class:`MergedLinears`)."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"low-rank pairs: rank is {self.rank!r}, expected a whole number of at least 1")
        if not self.scaling > 0:
            raise ValueError(f"low-rank pairs: scaling is {self.scaling!r}, expected a positive number")
        if self.targets not in get_args(Targets):
            known = " or ".join(get_args(Targets))
            raise ValueError(f"low-rank pairs: targets are {self.targets!r}, expected {known}")

    def rank_at(self, width: float) -> int:
        """Components that train at a width: the first ones, at least one.

        Raises:
            ValueError: not one of ``model_shape.WIDTHS``.
        """
        _check_width(width)
        return max(1, int(width * self.rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonalPairs(LowRankPairs):
    """Pairs that start anew in every round, each time from the same A, over what the client has learnt so far.

    What they learn joins the weights' changes at the aggregator (:meth:`TrainedUnits.published`); each client gets its
    own mixture of those, cut to ``prior_rank`` (:meth:`TrainedUnits.held`), and holds it frozen. A width is the share
    of the rows of B that train, chosen by the client; A trains whole (methods.md 10.2).

    Raises:
        ValueError: as for any pairs, or a prior of a rank below 1.
    """

    prior_rank: int = 32
    """r_d."""

    def __post_init__(self) -> None:
        LowRankPairs.__post_init__(self)
        if type(self.prior_rank) is not int or self.prior_rank < 1:
            raise ValueError(
                f"personal pairs: prior_rank is {self.prior_rank!r}, expected a whole number of at least 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedLinears:
    """The weights of target linears of every base layer, as their change from the checkpoint."""

    targets: Targets = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTensors:
    """The base's own tensors, trained from the checkpoint's values.

    Raises:
        ValueError: no layer, or layers that are not ascending.
    """

    layers: tuple[int, ...]
    tables: bool
    """Also embedding, final norm and head, as one unit with the number after the last layer's."""

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"base tensors: layers are {self.layers}, expected ascending ones, at least one")


Trainable = ExpandedBlocks | LowRankPairs | MergedLinears | BaseTensors
EXPANDED_BLOCKS: Final = ExpandedBlocks()


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTensors:
    """An extra tensor set of the run: trained and folded beside the other units, without width and strength.

    Raises:
        ValueError: no tensor, or a name twice.
    """

    name: str
    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.tensors]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"extra tensors {self.name!r}: tensors are {names}, expected at least one, each once")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedUnits:
    """The units of a run over a model of this shape.

    Raises:
        ValueError: layers beyond the model, or a rank above the smallest dimension of a target.
    """

    shape: ModelShape
    trainable: Trainable = EXPANDED_BLOCKS
    extra: NamedTensors | None = None

    def __post_init__(self) -> None:
        layers = self.shape.num_layers
        match self.trainable:
            case BaseTensors(layers=chosen):
                if chosen[-1] >= layers:
                    raise ValueError(f"base tensors: layers are {chosen}, the model has {layers}")
            case LowRankPairs(rank=rank, targets=targets):
                most = min(min(spec.shape) for spec in _targets(self.shape, targets))
                prior_rank = self.trainable.prior_rank if isinstance(self.trainable, PersonalPairs) else 0
                for name, found in (("rank", rank), ("prior_rank", prior_rank)):
                    if found > most:
                        raise ValueError(
                            f"low-rank pairs: {name} is {found}, expected at most {most}, the smallest dimension of a "
                            "target; a pair of a higher rank is larger than what it stands for"
                        )
            case ExpandedBlocks() | MergedLinears():
                pass
            case _:
                assert_never(self.trainable)

    def published(self) -> Units:
        """The units of the published state: those of the updates, but where what pairs learn joins the weights."""
        if isinstance(self.trainable, PersonalPairs) or (
            isinstance(self.trainable, LowRankPairs) and self.trainable.merged
        ):
            merged = MergedLinears(targets=self.trainable.targets)
            return TrainedUnits(shape=self.shape, trainable=merged, extra=self.extra)
        return self

    def held(self) -> Units:
        """The units of the state that a client gets and holds: the published ones, but where it is a prior of its own:
        B A of that rank, both zero at the start."""
        if isinstance(self.trainable, PersonalPairs):
            pairs = LowRankPairs(rank=self.trainable.prior_rank, scaling=1.0, targets=self.trainable.targets)
            return TrainedUnits(shape=self.shape, trainable=pairs, extra=self.extra)
        return self.published()


Units = ModelShape | TrainedUnits
"""What answers for the tensors of a unit."""


def unit_tensors(of: Units, unit: int, width: float = 1.0) -> tuple[TensorSpec, ...]:
    """All tensors of a unit in the order in which they are hashed, encoded and folded.

    At a smaller width the same tensors, each cut to its first rows or columns: nested, so that what a width trains
    every larger one trains too.

    Raises:
        ValueError: not one of ``model_shape.WIDTHS``.
        KeyError: the run has no such unit.
    """
    return of.block_tensors(width) if isinstance(of, ModelShape) else _unit_tensors(of, unit % CLUSTER_STRIDE, width)


def unit_parameters(of: Units, unit: int, width: float = 1.0) -> int:
    """Parameters that train in a unit of this width."""
    if isinstance(of, ModelShape):
        return of.slice_parameters(width)
    return _unit_parameters(of, unit % CLUSTER_STRIDE, width)


def unit_width(of: Units, unit: int, width: float) -> float:
    """The width at which a unit trains where ``width`` is assigned: 1 for a unit that has no widths."""
    if isinstance(of, ModelShape):
        return width
    whole = unit % CLUSTER_STRIDE == EXTRA_UNIT or isinstance(of.trainable, (MergedLinears, BaseTensors))
    return 1.0 if whole else width


def trained_unit_ids(of: TrainedUnits, blocks: Sequence[int]) -> tuple[int, ...]:
    """The numbers of all units of a run, ascending.

    Args:
        blocks: ids of the plan's expanded blocks.
    """
    layers = of.shape.num_layers
    match of.trainable:
        case ExpandedBlocks():
            ids = tuple(blocks)
        case LowRankPairs() | MergedLinears():
            ids = tuple(range(layers))
        case BaseTensors(layers=chosen, tables=tables):
            ids = (*chosen, layers) if tables else chosen
        case _:
            assert_never(of.trainable)
    return ids if of.extra is None else (*ids, EXTRA_UNIT)


def personal_pairs(of: Units) -> PersonalPairs | None:
    """What the units train, if it is that."""
    trainable = of.trainable if isinstance(of, TrainedUnits) else None
    return trainable if isinstance(trainable, PersonalPairs) else None


def block_units(units: Sequence[int]) -> tuple[int, ...]:
    """These units without the extra tensor set: those that stand in the stack and have a cost of their own."""
    return tuple(unit for unit in units if unit != EXTRA_UNIT)


def _check_width(width: float) -> None:
    if width not in WIDTHS:
        raise ValueError(f"width is {width!r}, expected one of {', '.join(map(str, WIDTHS))}")


def _targets(shape: ModelShape, targets: Targets) -> list[TensorSpec]:
    """The weights of the target linears, in the order of a layer's tensors."""
    matrices = [spec for spec in shape.block_tensors() if len(spec.shape) == 2]
    if targets == "all":
        return matrices
    return [spec for spec in matrices if spec.name.removesuffix(".weight").rsplit(".", 1)[-1] in QUERY_VALUE]


@lru_cache(maxsize=4096)
def _unit_tensors(of: TrainedUnits, unit: int, width: float) -> tuple[TensorSpec, ...]:
    if unit == EXTRA_UNIT and of.extra is not None:
        return of.extra.tensors
    shape, trainable = of.shape, of.trainable
    if isinstance(trainable, ExpandedBlocks):
        return shape.block_tensors(width)
    _check_width(width)
    if unit not in trained_unit_ids(of, ()):
        raise KeyError(f"the run has no unit {unit}; its units are {list(trained_unit_ids(of, ()))}")
    match trainable:
        case PersonalPairs(rank=rank, targets=targets):
            return tuple(spec for target in _targets(shape, targets) for spec in _chosen_rows(target, rank, width))
        case LowRankPairs(targets=targets):
            rank = trainable.rank_at(width)
            return tuple(spec for target in _targets(shape, targets) for spec in _pair(target, rank))
        case MergedLinears(targets=targets):
            return tuple(_targets(shape, targets))
        case BaseTensors():
            return _table_tensors(shape) if unit == shape.num_layers else shape.block_tensors()
        case _:
            assert_never(trainable)


def _pair(target: TensorSpec, rank: int) -> tuple[TensorSpec, TensorSpec]:
    """A and B of one linear. B is zero at the start and carries the strength."""
    linear = target.name.removesuffix(".weight")
    out, inner = target.shape
    return (
        TensorSpec(name=f"{linear}.lora_A", shape=(rank, inner)),
        TensorSpec(name=f"{linear}.lora_B", shape=(out, rank), is_out=True),
    )


def _chosen_rows(target: TensorSpec, rank: int, width: float) -> tuple[TensorSpec, TensorSpec]:
    """A and, of B, this share of the rows."""
    a, b = _pair(target, rank)
    if width == 1.0:
        return a, b
    rows = math.ceil(width * b.shape[0])
    return a, ChosenRows(name=b.name, shape=(rows, rank), is_out=True, num_rows=b.shape[0])


def _table_tensors(shape: ModelShape) -> tuple[TensorSpec, ...]:
    """Embedding, final norm and, where it is not the embedding, the head: by their names in the checkpoint."""
    table = (shape.vocab_size, shape.hidden_size)
    head = () if shape.tied_embeddings else (TensorSpec(name="lm_head.weight", shape=table),)
    return (
        TensorSpec(name="model.embed_tokens.weight", shape=table),
        TensorSpec(name="model.norm.weight", shape=(shape.hidden_size,)),
        *head,
    )


@lru_cache(maxsize=4096)
def _unit_parameters(of: TrainedUnits, unit: int, width: float) -> int:
    return sum(spec.size for spec in _unit_tensors(of, unit, width))
