"""Which devices does a simulated fleet have, and what happens to them? One TOML file.

seed = 1                     # the same seed gives the same run
max_hours = 100.0            # of virtual time
alpha = 0.5                  # topics per client from a Dirichlet distribution; 0: rows at random
costs_of = "qwen2.5-0.5b"    # whose time, bytes and memory are told
[run]                        # keys of run.toml
"training.steps" = 16
[chance]                     # of each task
dropout = 0.1                # the client vanishes in the middle of it
[[group]]
device = "jetson-orin-nano-8gb"
count = 8
[[event]]
at_s = 600.0
clients = "jetson-orin-nano-8gb"
kind = "slow"
factor = 3.0
"""

from __future__ import annotations

import difflib
import math
import sys
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from fedblocks.profiles import catalog_files
from fedblocks.protocol.run_config import ConfigError, checked_value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EventKind = Literal["leave", "join", "slow", "link"]

MAX_CLIENTS: Final = 1000
#: Models whose costs a fleet may have without their config.json.
SHAPES: Final = {"qwen2.5-0.5b": catalog_files.QWEN2_5_0_5B}

T = TypeVar("T")


def _require(holds: bool, where: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{where} is {value!r}, expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """What may happen to any task, drawn from the seed.

    Raises:
        ConfigError: a value is out of its range.
    """

    dropout: float = 0.0
    """Probability that the client vanishes during it."""
    rejoin_s: float = 30.0
    """After how long it is back."""
    straggler: float = 0.0
    """Probability that it takes ``straggler_factor`` times as long."""
    straggler_factor: float = 10.0
    jitter: float = 0.05
    """Standard deviation of the logarithm of every duration."""

    def __post_init__(self) -> None:
        for name in ("dropout", "straggler"):
            _require(0 <= getattr(self, name) <= 1, f"chance.{name}", getattr(self, name), "a share from 0 to 1")
        for name, least in (("rejoin_s", 0.0), ("straggler_factor", 1.0), ("jitter", 0.0)):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= least, f"chance.{name}", value, f"{least:g} or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Clients with the same device.

    Raises:
        ConfigError: a value is out of its range, or the catalog has no such device.
    """

    device: str
    """Name in the catalog."""
    count: int = 1
    name: str = ""
    """Prefix of the clients' names; default: the device."""
    examples: int = 40
    """Training rows of each client."""
    scale: float = 0.0
    """Share of the device's speed and memory; 0: that by which the trained model is smaller than Qwen2.5-0.5B, or all
    of it where the costs are those of another model."""
    link: float = 1.0
    """Factor on both directions of its link."""
    joins_s: float = 0.0
    """When its clients appear."""

    def __post_init__(self) -> None:
        known = catalog_files.names()
        _require(self.device in known, "group.device", self.device, f"one of {', '.join(known)}")
        _require(1 <= self.count <= MAX_CLIENTS, "group.count", self.count, f"1 to {MAX_CLIENTS}")
        _require(self.examples >= 1, "group.examples", self.examples, "at least 1")
        _require(0 <= self.scale <= 1, "group.scale", self.scale, "a share from 0 to 1")
        _require(math.isfinite(self.link) and self.link > 0, "group.link", self.link, "a positive factor")
        _require(math.isfinite(self.joins_s) and self.joins_s >= 0, "group.joins_s", self.joins_s, "0 or more")

    @property
    def prefix(self) -> str:
        """What its clients' names begin with."""
        return self.name or self.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happens to some clients at a time of its own.

    Raises:
        ConfigError: a value is out of its range.
    """

    at_s: float
    clients: str
    """A client, or a group by its prefix."""
    kind: EventKind
    factor: float = 1.0
    """slow: every duration times this from then on; link: both directions times this."""

    def __post_init__(self) -> None:
        _require(math.isfinite(self.at_s) and self.at_s >= 0, "event.at_s", self.at_s, "0 or more seconds")
        _require(math.isfinite(self.factor) and self.factor > 0, "event.factor", self.factor, "a positive factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The whole file.

    Raises:
        ConfigError: no client, too many, two with the same name, or an event for nobody.
    """

    groups: tuple[Group, ...]
    events: tuple[Event, ...] = ()
    chance: Chance = Chance()
    run: Mapping[str, Any] = field(default_factory=dict)
    """``section.key`` of run.toml -> value."""
    method: str = ""
    """``run.method``; empty: as ``run`` says, else the default."""
    seed: int = 0
    max_hours: float = 1000.0
    tick_s: float = 1.0
    """Steps of virtual time in which the aggregator looks at its clock while nothing arrives."""
    alpha: float = 0.0
    """Of the Dirichlet distribution from which each client draws its shares of the rows' topics; 0: rows at random."""
    share_topics: bool = False
    """Every site tells how many rows of each topic it has (``join.share_topics``)."""
    costs_of: str = ""
    """Whose time, bytes and memory are told: a name of :data:`SHAPES` or a config.json; empty: the trained model's."""

    def __post_init__(self) -> None:
        _require(math.isfinite(self.max_hours) and self.max_hours > 0, "max_hours", self.max_hours, "a positive number")
        _require(math.isfinite(self.tick_s) and self.tick_s > 0, "tick_s", self.tick_s, "a positive number")
        _require(math.isfinite(self.alpha) and self.alpha >= 0, "alpha", self.alpha, "0 or more")
        _require(
            self.costs_of in ("", *SHAPES) or Path(self.costs_of).is_file(),
            "costs_of",
            self.costs_of,
            f"{', '.join(SHAPES)}, or the path of a config.json",
        )
        total = sum(group.count for group in self.groups)
        _require(1 <= total <= MAX_CLIENTS, "the number of clients", total, f"1 to {MAX_CLIENTS}")
        prefixes = [group.prefix for group in self.groups]
        _require(len(set(prefixes)) == len(prefixes), "the list of groups", prefixes, "a name of its own for each")
        known = {*prefixes, *self.client_names()}
        for event in self.events:
            _require(event.clients in known, "event.clients", event.clients, "a group or a client of this file")

    def client_names(self) -> list[str]:
        """``<group>-1``, ``<group>-2``, ... of every group."""
        return [f"{group.prefix}-{i + 1}" for group in self.groups for i in range(group.count)]


def load(path: Path) -> Fleet:
    """The fleet of a file.

    Raises:
        ConfigError: the file is missing, no TOML, lacks a key, or holds one that cannot be used; the text names it.
    """
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; docs/simulate.md shows one") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    try:
        return _fleet(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _fleet(content: dict[str, Any]) -> Fleet:
    own = {f.name for f in fields(Fleet)} - {"groups", "events"}
    allowed = [*sorted(own), "group", "event"]
    for key in content:
        if key not in allowed:
            raise ConfigError(f"unknown key {key!r}; nearest key: {_nearest(key, allowed)}")
    hints = typing.get_type_hints(Fleet)
    plain = {
        key: checked_value(key, hints[key], content[key])
        for key in ("method", "seed", "max_hours", "tick_s", "alpha", "share_topics", "costs_of")
        if key in content
    }
    return Fleet(
        groups=tuple(_made(Group, "group", item) for item in _list(content, "group")),
        events=tuple(_made(Event, "event", item) for item in _list(content, "event")),
        chance=_made(Chance, "chance", content.get("chance", {})),
        run=_flat(content.get("run", {})),
        **plain,
    )


def _nearest(key: str, known: list[str]) -> str:
    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def _list(content: Mapping[str, Any], key: str) -> list[Any]:
    found = content.get(key, [])
    if not isinstance(found, list):
        raise ConfigError(f"{key} is {found!r}, expected sections [[{key}]]")
    return found


def _made(kind: type[T], where: str, written: Any) -> T:
    if not isinstance(written, dict):
        raise ConfigError(f"{where} is {written!r}, expected a section")
    hints = typing.get_type_hints(kind)
    for key in written:
        if key not in hints:
            raise ConfigError(f"unknown key '{where}.{key}'; nearest key: {_nearest(key, list(hints))}")
    for f in fields(kind):  # type: ignore[arg-type]
        if f.default is MISSING and f.default_factory is MISSING and f.name not in written:
            raise ConfigError(f"{where}.{f.name} is missing")
    return kind(**{key: checked_value(f"{where}.{key}", hints[key], value) for key, value in written.items()})


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables and dotted keys alike -> ``section.key``."""
    if not isinstance(section, dict):
        raise ConfigError(f"run is {section!r}, expected a section of run.toml's keys")
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
