"""What does the operator decide about a run? One TOML file, ``run.toml``, with units in the key names.

``fedblocks init`` writes it with comments, ``fedblocks serve`` reads it; an unknown key is an error that names the
nearest known one.
Every key can be set on the command line as ``--set section.key=value``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from fedblocks.profiles.units import Targets
from fedblocks.protocol.messages import DeltaFormat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MethodName = Literal[
    "fedbe", "fedavg", "fedprox", "fedit", "hetlora", "flexlora", "flora", "topn", "llamapro", "fedhft"
]
"""What ``run.method`` may be; each has its file in ``aggregator/methods/``."""
#: A budget that nothing exceeds, for an anchor without a budget. An infinite one means no anchor.
NO_BUDGET: Final = sys.float_info.max
MAX_CLUSTERS: Final = 4
Placement = Literal["thirds", "top", "interleaved", "adaptive"]
ServerOptimizer = Literal["avg", "avgm", "adam"]
FoldKind = Literal["mean", "median", "trimmed_mean"]
Policy = Literal["fitted", "whole", "uniform", "weakest", "random"]
"""fitted: by hardware and need. whole: everything or nothing, at the largest width that fits. The others are for
comparisons. uniform: all blocks for everybody, whatever the deadline; weakest: for everybody what the weakest client
that can train trains; random: for each client one of its options."""

#: As the papers have them: everything or nothing, no anchor, fp32 both ways, no weight decay.
_AS_PUBLISHED: Final[dict[str, Any]] = {
    "training.weight_decay": 0.0,
    "forgetting.max_kl": math.inf,
    "delta.format": "fp32",
    "allocation.policy": "whole",
    "allocation.slim": False,
}
#: Pairs of which each client trains as many components as its device allows: 4, 8, 16 or 32.
_TIER_RANKS: Final[dict[str, Any]] = {**_AS_PUBLISHED, "allocation.slim": True, "trainable.rank": 32}
#: Pairs that turn as a whole, or start anew, in every round: a row that waits for a later one would not fit there.
_WHOLE_ROWS: Final[dict[str, Any]] = {"delta.density": 1.0, "delta.down_density": 1.0}
#: Values that a method has where nobody says otherwise.
METHOD_DEFAULTS: Final[Mapping[MethodName, Mapping[str, Any]]] = {
    "fedbe": {},
    "fedavg": _AS_PUBLISHED,
    "fedprox": {**_AS_PUBLISHED, "training.proximal_weight": 0.01},
    "fedit": _AS_PUBLISHED,
    "hetlora": _TIER_RANKS,
    "flexlora": {**_TIER_RANKS, **_WHOLE_ROWS},
    "flora": {**_TIER_RANKS, **_WHOLE_ROWS},
    "topn": _AS_PUBLISHED,
    "llamapro": {**_AS_PUBLISHED, "expansion.placement": "interleaved"},
    "fedhft": {**_TIER_RANKS, **_WHOLE_ROWS, "trainable.scaling": 1.0, "trainable.targets": "qv"},
}


class ConfigError(ValueError):
    """A key or value that cannot be used (exit code 2); the text names it and what is expected."""

    exit_code = 2


def _key(default: Any, about: str) -> Any:
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    """How long the run goes on."""

    method: MethodName = _key(
        "fedbe", "the method: expanded blocks, allocated by hardware, anchored to the base; others in docs/methods.md"
    )
    rule: str = _key(
        "", "a file FILE.py or a module of your own that folds instead of the method (docs/tutorial-method.md)"
    )
    max_rounds: int = _key(100, "the run ends after this many rounds")
    target_score: float = _key(0.0, "stop once the 3-round mean of the pooled validation score reaches this; 0: never")
    max_seconds: float = _key(0.0, "stop once the rounds have taken so many seconds; 0: no limit")
    max_bytes: float = _key(0.0, "stop once so many bytes went through the sockets, both ways; 0: no limit")
    max_joules: float = _key(
        0.0,
        "stop once the clients' work took so much energy, by time and the board's power in the catalog; 0: no limit",
    )
    seed: int = _key(1, "seeds data order and anchor shards; a run is repeatable given the same arrivals")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpansionSection:
    """Where the trainable blocks stand."""

    placement: Placement = _key("thirds", "thirds | top | interleaved | adaptive (docs/methods.md)")
    blocks: int = _key(3, "number of expanded blocks at the start")
    max_blocks: int = _key(
        0, "a block is added whenever the score stands still, up to so many (docs/methods.md); 0: no growth"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainableSection:
    """What trains where a method adds no blocks (docs/methods.md); fixed when the run folder is made."""

    rank: int = _key(16, "largest rank of the low-rank pairs; with allocation.slim also 1/2, 1/4 and 1/8 of it")
    scaling: float = _key(2.0, "alpha / rank of the pairs, the same for every rank")
    prior_rank: int = _key(32, "fedhft: rank to which what a client has learnt so far is cut when it is sent to it")
    targets: Targets = _key("all", "all | qv: pairs over every projection, or over those of queries and values")
    top_layers: int = _key(1, "topn: so many of the base's highest layers train")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSection:
    """The local training of one round (methods.md 5.4)."""

    learning_rate: float = _key(3e-4, "AdamW; 3e-4 to 3e-3 is usual for expanded blocks")
    round_decay: Literal["linear", "constant"] = _key("linear", "linear: lr·(1 - 0.9·round/max_rounds)")
    steps: int = _key(16, "optimizer steps per client and round; slow clients get fewer")
    batch_size: int = _key(8, "sequences per step")
    anchor_batch_size: int = _key(4, "anchor sequences per step")
    anchor_every: int = _key(1, "use the anchor in every n-th step, n times as strong")
    weight_decay: float = _key(0.01, "on the output projections only: it pulls to the identity")
    clip_norm: float = _key(1.0, "global gradient norm")
    proximal_weight: float = _key(0.0, "mu of FedProx: pulls each client to the values that its round started from")
    server_optimizer: ServerOptimizer = _key(
        "avg", "what the aggregator does with a round's mean update: avg adds it; avgm, adam (docs/methods.md)"
    )
    fold: FoldKind = _key(
        "mean", "mean by weight; median, trimmed_mean: value by value, against hostile updates (docs/security.md)"
    )
    adam_beta1: float = _key(0.9, "AdamW")
    adam_beta2: float = _key(0.99, "AdamW")
    adam_eps: float = _key(1e-8, "AdamW")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """How every site turns its rows into tokens; sent to the sites (messages.DataFormat)."""

    max_tokens: int = _key(512, "training examples are cut to this many tokens")
    append_eos: bool = _key(True, "end each completion with the end-of-sequence token, as a target")
    join: str = _key(" ", "stands between prompt and completion where neither brings white space of its own")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgettingSection:
    """The forgetting budget and its controller (methods.md 5.3)."""

    max_kl: float = _key(0.03, "nats per token of KL to the base model that the run may spend")
    max_drift: float = _key(
        0.0,
        "encoders: squared distance of a text's embedding to the base's, of length 1, that the run may spend, in the "
        "mean over anchor texts; 0: no budget, and the anchor keeps lambda_start",
    )
    min_retention: float = _key(
        0.0, "least share of the base's score on the general validation file that an export keeps; 0: no floor"
    )
    lambda_start: float = _key(1.0, "first weight of the anchor term")
    min_lambda: float = _key(
        1.0, "the controller never goes below this; 0: pure dual ascent, which may drop the anchor"
    )
    lambda_max: float = _key(20.0, "largest weight of the anchor term")
    eta: float = _key(0.25, "step of the controller")

    @property
    def name(self) -> str:
        """``kl``, or of an encoder's run (:func:`for_model`) ``drift``."""
        return "drift" if self.max_drift > 0 or self.max_kl == NO_BUDGET else "kl"

    @property
    def budget(self) -> float | None:
        """Of that; None where nothing is enforced."""
        return None if self.max_kl == NO_BUDGET else self.max_kl


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSection:
    """How updates travel (methods.md 7)."""

    format: DeltaFormat = _key("int8", "int8 | bf16 | fp32")
    density: float = _key(
        0.25, "share of the rows of each matrix that an int8 update sends; the rest waits on the client"
    )
    down_density: float = _key(0.25, "the same for the published state")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacySection:
    """Differential privacy for whole clients; needs fedblocks[privacy] (docs/security.md)."""

    noise_multiplier: float = _key(0.0, "standard deviation of the noise on a round's sum over clip_norm; 0: off")
    clip_norm: float = _key(0.0, "most that one client's part in a round may measure (norm over all its blocks)")
    delta: float = _key(1e-5, "chance with which epsilon may fail to hold; far below 1 over the number of clients")
    max_epsilon: float = _key(8.0, "the run ends before it has spent more than this")


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationSection:
    """Who trains what, and how long a round may last (methods.md 6)."""

    deadline_s: float = _key(0.0, "seconds from assignment to upload; 0: computed from the measured speeds")
    min_cohort: int = _key(1, "clients that must be present before a round opens")
    quorum: float = _key(0.7, "share of the assigned clients whose update closes a round at its deadline")
    rejoin_grace_s: float = _key(30.0, "one extension of a round that misses its quorum")
    cohort_fraction: float = _key(
        0.0, "share of the clients in each round; 0: all up to 16 clients, else 0.4 and at least 8"
    )
    debt_weight: float = _key(1.0, "beta: how much a block that lags behind is preferred")
    rarity_weight: float = _key(
        0.0, "gamma: how much clients with rare topics are preferred; sites must share topics (docs/allocation.md)"
    )
    slim: bool = _key(True, "let devices that cannot train a whole block train 1/2, 1/4 or 1/8 of it")
    policy: Policy = _key(
        "fitted",
        "fitted: by hardware and need; whole: everything or nothing; uniform, weakest, random: for comparisons",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSection:
    """Whether each client gets expanded blocks of its own, mixed from clusters of clients (docs/fedhft.md)."""

    clusters: int = _key(1, "clusters of clients, up to 4; 1: one model for all")
    from_round: int = _key(5, "until this round has been folded every client belongs to all clusters alike")
    min_clients: int = _key(8, "clients are grouped once so many of them have trained the same block")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSection:
    """Where the aggregator listens."""

    bind: str = _key("tcp://*:5555", "ZeroMQ address that serve binds")
    public_address: str = _key(
        "tcp://127.0.0.1:5555", "address that goes into the site files; the name sites can reach"
    )
    heartbeat_interval_s: float = _key(5.0, "clients report this often")
    metrics_address: str = _key(
        "",
        "host:port of a read-only page, /status.json and /metrics (Prometheus), e.g. 127.0.0.1:9100; empty: off",
    )
    quarantine_after: int = _key(
        3, "a client whose updates were refused so often gets no task until `fedblocks keys release`; 0: never"
    )
    keep_updates: bool = _key(
        False,
        "keep every update and its books for a replay; false: until the next version is there, books for 32 rounds",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """All sections of run.toml.

    Raises:
        ConfigError: a value is out of its range.
    """

    run: RunSection = field(default_factory=RunSection)
    expansion: ExpansionSection = field(default_factory=ExpansionSection)
    trainable: TrainableSection = field(default_factory=TrainableSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    data: DataSection = field(default_factory=DataSection)
    forgetting: ForgettingSection = field(default_factory=ForgettingSection)
    delta: DeltaSection = field(default_factory=DeltaSection)
    privacy: PrivacySection = field(default_factory=PrivacySection)
    allocation: AllocationSection = field(default_factory=AllocationSection)
    mixture: MixtureSection = field(default_factory=MixtureSection)
    server: ServerSection = field(default_factory=ServerSection)

    def __post_init__(self) -> None:
        for key in (
            "run.max_rounds",
            "expansion.blocks",
            "trainable.rank",
            "trainable.prior_rank",
            "trainable.top_layers",
            "training.steps",
            "training.batch_size",
            "training.anchor_every",
            "data.max_tokens",
            "allocation.min_cohort",
            "mixture.from_round",
            "mixture.min_clients",
        ):
            self._require(key, self.value(key) >= 1, "at least 1")
        for key in (
            "trainable.scaling",
            "training.learning_rate",
            "training.clip_norm",
            "training.adam_eps",
            "forgetting.eta",
            "allocation.rejoin_grace_s",
            "server.heartbeat_interval_s",
        ):
            self._require(key, self.value(key) > 0, "a positive number")
        for key in (
            "run.target_score",
            "run.max_seconds",
            "run.max_bytes",
            "run.max_joules",
            "expansion.max_blocks",
            "training.weight_decay",
            "training.proximal_weight",
            "training.anchor_batch_size",
            "server.quarantine_after",
            "privacy.noise_multiplier",
            "privacy.clip_norm",
            "allocation.deadline_s",
            "allocation.debt_weight",
            "allocation.rarity_weight",
            "forgetting.max_drift",
            "forgetting.lambda_start",
            "forgetting.min_lambda",
        ):
            self._require(key, self.value(key) >= 0, "0 or more")
        self._require(
            "expansion.max_blocks",
            self.expansion.max_blocks == 0 or self.expansion.max_blocks >= self.expansion.blocks,
            f"0 (no growth) or at least expansion.blocks ({self.expansion.blocks})",
        )
        self._require(
            "expansion.max_blocks",
            self.expansion.placement != "interleaved" or self.expansion.max_blocks in (0, self.expansion.blocks),
            "0: placement 'interleaved' places all its blocks at once; to grow take 'thirds' or 'top'",
        )
        for key in ("delta.density", "delta.down_density", "allocation.quorum"):
            self._require(key, 0 < self.value(key) <= 1, "a number above 0 and at most 1")
        self._require("allocation.cohort_fraction", 0 <= self.allocation.cohort_fraction <= 1, "a share from 0 to 1")
        for key in ("training.adam_beta1", "training.adam_beta2"):
            self._require(key, 0 <= self.value(key) < 1, "a number of at least 0 and below 1")
        self._require(
            "training.fold",
            self.training.fold == "mean" or self.run.method == "fedbe",
            f"mean: the method {self.run.method} folds by a rule of its own",
        )
        self._require(
            "training.fold",
            self.training.fold == "mean" or self.delta.format != "int8" or self.delta.density == 1,
            "mean where int8 updates send a part of their rows: a row that is not sent would count as zero; "
            "set delta.density to 1, or delta.format to bf16 or fp32",
        )
        self._require(
            "server.metrics_address",
            not self.server.metrics_address or split_address(self.server.metrics_address) != NO_ADDRESS,
            "host:port with a port from 0 to 65535, or nothing",
        )
        for key in ("delta.density", "delta.down_density"):
            masked = self.delta.format == "int8" and self.value(key) < 1
            self._require(
                key,
                not masked or self.run.method not in ("flexlora", "flora", "fedhft"),
                f"1: the pairs of the method {self.run.method} are others in every round, and a row cannot wait for it",
            )
        if self.run.method == "fedhft":
            folds = "the method fedhft adds what each client's pairs amount to"
            self._require("training.server_optimizer", self.training.server_optimizer == "avg", f"avg: {folds}")
            self._require("run.rule", not self.run.rule, f"none: {folds}")
        self._check_privacy()
        self._require("mixture.clusters", 1 <= self.mixture.clusters <= MAX_CLUSTERS, f"1 to {MAX_CLUSTERS}")
        if self.mixture.clusters > 1:
            personal = "where clients have models of their own (mixture.clusters above 1)"
            self._require("run.method", self.run.method in ("fedbe", "fedhft"), f"fedbe or fedhft {personal}")
            self._require("run.rule", not self.run.rule, f"none {personal}")
            self._require("training.fold", self.training.fold == "mean", f"mean {personal}")
            self._require("privacy.noise_multiplier", self.privacy.noise_multiplier == 0, f"0 {personal}")
        self._require(
            "forgetting.max_kl",
            self.forgetting.max_kl > 0,
            "a positive number (for no change at all use strength 0, or do not train)",
        )
        self._require("forgetting.min_retention", 0 <= self.forgetting.min_retention <= 1, "a share from 0 to 1")
        self._require(
            "forgetting.min_lambda",
            self.forgetting.min_lambda <= self.forgetting.lambda_start,
            f"at most forgetting.lambda_start ({self.forgetting.lambda_start:g})",
        )
        self._require(
            "forgetting.lambda_max",
            self.forgetting.lambda_max >= self.forgetting.lambda_start,
            "at least forgetting.lambda_start",
        )

    @property
    def most_blocks(self) -> int:
        """Expanded blocks that the run may come to have."""
        return max(self.expansion.blocks, self.expansion.max_blocks)

    def _check_privacy(self) -> None:
        self._require("privacy.delta", 0 < self.privacy.delta < 1, "a number above 0 and below 1")
        self._require("privacy.max_epsilon", self.privacy.max_epsilon > 0, "a positive number")
        if self.privacy.noise_multiplier == 0:
            return
        private = "with privacy.noise_multiplier set"
        self._require("privacy.clip_norm", self.privacy.clip_norm > 0, f"a positive number {private}")
        self._require(
            "expansion.placement",
            self.expansion.placement != "adaptive",
            f"thirds, top or interleaved {private}: what clients find when they try a block is sent without noise",
        )
        self._require("run.method", self.run.method == "fedbe", f"fedbe {private}")
        self._require("training.fold", self.training.fold == "mean", f"mean {private}")
        self._require(
            "allocation.rarity_weight", self.allocation.rarity_weight == 0, f"0 {private}: no topics are shared"
        )
        self._require(
            "delta.format",
            self.delta.format != "int8",
            f"bf16 or fp32 {private}: int8 leaves a rest for later rounds",
        )

    def value(self, key: str) -> Any:
        """The value of ``section.key``."""
        section, name = key.split(".")
        return getattr(getattr(self, section), name)

    def _require(self, key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{key} is {self.value(key)!r}, expected {expected}")


#: What :func:`split_address` says of a text that is no address.
NO_ADDRESS = ("", -1)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``; :data:`NO_ADDRESS` where it is none."""
    host, colon, port = address.rpartition(":")
    if not host or not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        return NO_ADDRESS
    return host.strip("[]"), int(port)


def known_keys() -> list[str]:
    """Every ``section.key``, in file order."""
    return [f"{s.name}.{f.name}" for s in dataclasses.fields(RunConfig) for f in dataclasses.fields(_section(s.name))]


def from_mapping(sections: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """A config from parsed TOML and ``section.key=value`` overrides.

    Raises:
        ConfigError: an unknown section or key (names the nearest), or a value of the wrong type or range.
    """
    values: dict[str, Any] = {}
    for section, content in sections.items():
        if not isinstance(content, dict):
            raise ConfigError(
                f"{section!r} stands outside a section; nearest key: {nearest_key(section, known_keys())}"
            )
        values.update({f"{section}.{key}": v for key, v in typing.cast("dict[str, Any]", content).items()})
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override!r}: expected section.key=value")
        values[key.strip()] = _parse_scalar(text.strip())
    known = known_keys()
    method = checked_value("run.method", MethodName, values.get("run.method", "fedbe"))
    values = {**METHOD_DEFAULTS[method], **values}
    sections_out: dict[str, dict[str, Any]] = {f.name: {} for f in dataclasses.fields(RunConfig)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown key {key!r}; nearest key: {nearest_key(key, known)}")
        section, name = key.split(".")
        hint = typing.get_type_hints(_section(section))[name]
        sections_out[section][name] = checked_value(key, hint, value)
    return RunConfig(**{name: _section(name)(**content) for name, content in sections_out.items()})


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in ``path``.

    Raises:
        ConfigError: the file is missing, is no TOML, or holds a key or value that cannot be used.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist; make a run folder with: fedblocks init --model DIR --out RUN"
        ) from error
    try:
        return from_mapping(tomllib.loads(text), overrides)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


#: Keys that only decoders' runs have, and only encoders'.
_OF_DECODERS: Final = ("forgetting.max_kl", "forgetting.min_retention")
_OF_ENCODERS: Final = ("forgetting.max_drift",)


def for_model(config: RunConfig, *, encoder: bool) -> RunConfig:
    """The config as the rules of a run read it: an encoder's drift and its budget stand in the place of KL and
    ``forgetting.max_kl`` (methods.md 2.6).

    Raises:
        ConfigError: a key of the other kind of model is set.
    """
    foreign = _OF_DECODERS if encoder else _OF_ENCODERS
    of_method = METHOD_DEFAULTS[config.run.method]
    # A method that has no anchor unless somebody asks for one has none of either kind.
    drift = config.forgetting.max_drift or of_method.get("forgetting.max_kl", NO_BUDGET)
    for key in foreign:
        name = key.split(".")[1]
        default = next(f.default for f in dataclasses.fields(ForgettingSection) if f.name == name)
        default = of_method.get(key, default)
        already = encoder and name == "max_kl" and config.forgetting.max_kl == drift
        if config.value(key) != default and not already:
            raise ConfigError(f"{key} is {config.value(key)!r}: {foreign_key_text(key)}")
    if not encoder:
        return config
    return dataclasses.replace(config, forgetting=dataclasses.replace(config.forgetting, max_kl=drift))


def foreign_key_text(key: str) -> str:
    """Why this key is not for the run's kind of model, and what to set instead; empty if any run may set it."""
    return {
        "forgetting.max_kl": "an encoder predicts no tokens, its forgetting is the drift of its embedding; set "
        "forgetting.max_drift instead",
        "forgetting.min_retention": "an encoder's general ability is measured by fedblocks evaluate, not in the run; "
        "set forgetting.max_drift instead",
        "forgetting.max_drift": "drift is for encoders; a decoder's forgetting is KL, set forgetting.max_kl instead",
    }.get(key, "")


def foreign_override(overrides: Sequence[str], *, encoder: bool) -> str | None:
    """The first ``section.key=value`` that only the other kind of model has; None if there is none."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    return next((key for key in keys if key in (_OF_DECODERS if encoder else _OF_ENCODERS)), None)


def to_toml(config: RunConfig, *, encoder: bool | None = None) -> str:
    """The config as commented TOML; ``load`` reads it back unchanged.

    Args:
        encoder: whether the run's model is one: the keys of the other kind are left out; None: no key is.
    """
    absent = () if encoder is None else _OF_DECODERS if encoder else _OF_ENCODERS
    lines: list[str] = [
        "# A fedblocks run. Every key may also be given as: fedblocks serve RUN --set section.key=value"
    ]
    for section in dataclasses.fields(RunConfig):
        part = getattr(config, section.name)
        about = (type(part).__doc__ or "").strip()
        lines += ["", f"# {about}", f"[{section.name}]"]
        for f in dataclasses.fields(part):
            if f"{section.name}.{f.name}" in absent:
                continue
            lines.append(f"{f.name} = {_toml(getattr(part, f.name))}  # {f.metadata['about']}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    return "inf" if value == math.inf else json.dumps(value)


def _section(name: str) -> type[Any]:
    return typing.cast("type[Any]", typing.get_type_hints(RunConfig).get(name))


def nearest_key(key: str, names: Sequence[str]) -> str:
    """Of the known ``section.key`` names the one that was probably meant."""
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
    tail = [n for n in names if n.split(".")[1] == key.split(".")[-1]]
    return (tail or close)[0]


def _parse_scalar(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def checked_value(key: str, hint: Any, value: Any) -> Any:
    """``value`` as the type that ``key`` has; a whole number serves where a real one is meant.

    Raises:
        ConfigError: it is of another type, or none of the allowed texts.
    """
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise ConfigError(f"{key} is {value!r}, expected one of {', '.join(options)}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{key} is {value!r}, expected a value of type {hint.__name__}")
    return value
