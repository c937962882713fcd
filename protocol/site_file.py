"""What does a site get from the operator, and what may it decide for itself? One small TOML file.

``fedblocks invite`` writes it, ``fedblocks join`` reads it; it holds no secret.
``[site]`` and ``[data]`` say where the run is and what must match; they are the operator's.
``[cache]``, ``[runtime]``, ``[kernels]`` and ``[join]`` are the site's own: all their keys have defaults, and the
command line of ``join`` goes over them.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

from fedblocks.protocol.codec import from_plain
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.messages import DataFormat
from fedblocks.protocol.run_config import ConfigError, checked_value, nearest_key

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CacheLocation = Literal["auto", "disk", "ram"]
RuntimeDtype = Literal["auto", "float32", "bfloat16"]
KernelBackend = Literal["auto", "pack", "triton", "torch"]

#: Bytes of a GB in these settings.
GB: Final = 10**9
MINUTES_PER_DAY: Final = 24 * 60
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HOURS: Final = re.compile(r"\s*(\d{1,2})(?::(\d{2}))?\s*-\s*(\d{1,2})(?::(\d{2}))?\s*")
#: Sections that every invitation has, and their keys' place in :class:`SiteFile`.
_OPERATORS: Final = ("site", "data")


def _key(default: Any, about: str) -> Any:
    return field(default=default, metadata={"about": about})


def _require_amount(key: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{key} is {value!r}, expected a number of 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """How much this site keeps of what the frozen layers computed, where, and for how long.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_gb: float = _key(0.0, "most that the cache may take, GB; 0: a share of what is free")
    location: CacheLocation = _key("auto", "auto | disk | ram")
    keep: bool = _key(True, "false: wiped when join ends; it holds hidden states, which are nearly the text")

    def __post_init__(self) -> None:
        _require_amount("cache.max_gb", self.max_gb)

    @property
    def max_bytes(self) -> int | None:
        """The limit in bytes; None leaves it to the client."""
        return round(self.max_gb * GB) if self.max_gb else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings:
    """What the training of this site may use.

    Raises:
        ConfigError: a value is out of its range.
    """

    dtype: RuntimeDtype = _key("auto", "auto | float32 | bfloat16: type of the arithmetic; auto: what suits the device")
    memory_gb: float = _key(0.0, "most memory above the imports that a task may take, GB; 0: what the device has")

    def __post_init__(self) -> None:
        _require_amount("runtime.memory_gb", self.memory_gb)

    @property
    def memory_bytes(self) -> int:
        """The limit in bytes; 0 means none but the device's."""
        return round(self.memory_gb * GB)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsSettings:
    """Who carries out the operations of a GPU.

    Raises:
        ConfigError: a value cannot be read.
    """

    backend: KernelBackend = _key("auto", "auto | pack | triton | torch: who computes on a GPU; see fedblocks kernels")
    overrides: str = _key("", 'the same for single operations, e.g. "rope_=torch, nf4_linear=triton"')

    def __post_init__(self) -> None:
        self.parsed_overrides()

    def parsed_overrides(self) -> dict[str, KernelBackend]:
        """Operation -> backend; whether there is such an operation is for the kernels to say."""
        found: dict[str, KernelBackend] = {}
        for part in filter(None, (part.strip() for part in self.overrides.split(","))):
            op, _, backend = (word.strip() for word in part.partition("="))
            if not op or backend not in typing.get_args(KernelBackend):
                raise ConfigError(
                    f"kernels.overrides holds {part[:60]!r}, expected OPERATION=BACKEND with one of "
                    f"{', '.join(typing.get_args(KernelBackend))}"
                )
            found[op] = cast("KernelBackend", backend)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """A part of every day, from ``start`` to before ``end``, minutes after midnight; it may reach over midnight."""

    start: int
    end: int

    def contain(self, minute: int) -> bool:
        """Does this minute of the day, 0 to 1439, belong to it?"""
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinSettings:
    """When this site takes part, and what it tells.

    Raises:
        ConfigError: a value cannot be read.
    """

    hours: str = _key("", 'local hours in which this site takes tasks, e.g. "22-6" or "20:00-06:30"; empty: always')
    share_topics: bool = _key(
        False,
        'tell how many rows there are of each topic (the rows\' key "topic", else short completions), as 64 counts',
    )

    def __post_init__(self) -> None:
        self.parsed_hours()

    def parsed_hours(self) -> Hours | None:
        """The hours; None means always."""
        if not self.hours:
            return None
        found = _HOURS.fullmatch(self.hours)
        if found is not None:
            start, end = (int(h) * 60 + int(m or 0) for h, m in (found.group(1, 2), found.group(3, 4)))
            minutes_are_real = all(int(m or 0) < 60 for m in found.group(2, 4))
            if minutes_are_real and start < MINUTES_PER_DAY and end <= MINUTES_PER_DAY and start != end:
                return Hours(start=start, end=end)
        raise ConfigError(
            f'join.hours is {self.hours!r}, expected two different times of day such as "22-6" or "20:00-06:30"'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsSettings:
    """What this site lets a run do with the model."""

    allow_base_training: bool = _key(
        False, "true: runs that train the base's own weights, and send their changes, may use this site"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFile:
    """The invitation of one site.

    Raises:
        ConfigError: a field is not what it should be.
    """

    client_name: str
    address: str
    """ZeroMQ address of the aggregator, ``tcp://host:port``."""
    server_key: str
    """The aggregator's CURVE public key, Z85."""
    run_id: str
    base_name: str
    base_hash: str
    data: DataFormat
    cache: CacheSettings = CacheSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    kernels: KernelsSettings = KernelsSettings()
    join: JoinSettings = JoinSettings()
    limits: LimitsSettings = LimitsSettings()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.client_name):
            raise ConfigError(
                f"client_name is {self.client_name!r}, expected 1 to 63 letters, digits, dots, hyphens or underscores"
            )
        if not re.fullmatch(r"tcp://[^\s:]+:\d{1,5}|tcp://\[[0-9a-fA-F:]+\]:\d{1,5}", self.address):
            raise ConfigError(f"address is {self.address!r}, expected tcp://host:port")
        if len(self.server_key) != 40:
            raise ConfigError(f"server_key has {len(self.server_key)} characters, expected the 40 of a Z85 public key")
        # The client keeps its state in a folder of this name.
        if self.run_id in ("", "..") or Path(self.run_id).name != self.run_id or "\0" in self.run_id:
            raise ConfigError(f"run_id is {self.run_id[:60]!r}, expected the name of a run")
        if not re.fullmatch(r"[0-9a-f]{64}", self.base_hash):
            raise ConfigError(f"base_hash is {self.base_hash[:20]!r}…, expected 64 hexadecimal digits")


#: Sections that a site may write, by their field in :class:`SiteFile`.
_SITES_OWN: Final[dict[str, type[Any]]] = {
    "cache": CacheSettings,
    "runtime": RuntimeSettings,
    "kernels": KernelsSettings,
    "join": JoinSettings,
    "limits": LimitsSettings,
}


def local_keys() -> list[str]:
    """Every ``section.key`` that a site may set, in file order."""
    return [f"{section}.{f.name}" for section, settings in _SITES_OWN.items() for f in fields(settings)]


def dump(site: SiteFile) -> str:
    """The file's text; :func:`load` reads it back unchanged."""
    lines = [
        "# Invitation to a fedblocks run. Use it with:",
        f"#   fedblocks join {site.client_name}.toml --data train.jsonl --model DIR",
        "# It holds no secret; the site's own key is made on the site and never leaves it.",
        "[site]",
    ]
    operators = [f.name for f in fields(site) if f.name not in (*_OPERATORS, *_SITES_OWN)]
    lines += [f"{name} = {json.dumps(getattr(site, name))}" for name in operators]
    lines += ["", "# How the run turns rows into tokens; the same for every site.", "[data]"]
    lines += [
        f"{f.name} = {json.dumps(getattr(site.data, f.name))}"
        for f in fields(site.data)
        if f.name != "labels" or site.data.labels
    ]
    lines += ["", "# From here on the site decides. Take the # away to set a key."]
    for section in _SITES_OWN:
        settings = getattr(site, section)
        lines.append(f"[{section}]")
        for f in fields(settings):
            value = getattr(settings, f.name)
            mark = "# " if value == f.default else ""
            lines.append(f"{mark}{f.name} = {json.dumps(value)}  # {f.metadata['about']}")
    return "\n".join(lines) + "\n"


def load(path: Path, overrides: Mapping[str, object] | None = None) -> SiteFile:
    """The invitation in ``path``.

    Args:
        overrides: ``section.key`` of the site's own sections -> value, stronger than the file.

    Raises:
        ConfigError: the file is missing, no TOML, lacks a field, or holds a key or value that cannot be used.
    """
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; the operator makes it with: fedblocks invite RUN NAME") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    try:
        operators = _operators_part(content)
        own = {f"{section}.{key}": value for section in _SITES_OWN for key, value in _section(content, section).items()}
        site = with_settings(operators, own)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return with_settings(site, overrides or {})


def with_settings(site: SiteFile, settings: Mapping[str, object]) -> SiteFile:
    """The invitation with these ``section.key`` of the site's own sections set.

    Raises:
        ConfigError: an unknown key (names the nearest), or a value of the wrong type or range.
    """
    known = local_keys()
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"unknown key {key!r}; nearest key: {nearest_key(key, known)}")
        section, name = key.split(".")
        hint = typing.get_type_hints(_SITES_OWN[section])[name]
        changed = replace(getattr(site, section), **{name: checked_value(key, hint, value)})
        site = replace(site, **{section: changed})
    return site


def _operators_part(content: Mapping[str, Any]) -> SiteFile:
    """The invitation as the operator wrote it; sections that nobody knows are refused."""
    for section in content:
        if section not in (*_OPERATORS, *_SITES_OWN):
            (nearest,) = difflib.get_close_matches(section, (*_OPERATORS, *_SITES_OWN), n=1, cutoff=0.0)
            raise ConfigError(f"unknown section [{section}]; nearest section: [{nearest}]")
    if not all(isinstance(content.get(section), dict) for section in _OPERATORS):
        raise ConfigError(
            f"has the sections {sorted(content)}, expected [site] and [data]; ask the operator for a new one"
        )
    written = _section(content, "site")
    known = [f.name for f in fields(SiteFile) if f.name not in (*_OPERATORS, *_SITES_OWN)]
    for key in written:
        if key not in known:
            nearest = nearest_key(f"site.{key}", [*(f"site.{name}" for name in known), *local_keys()])
            raise ConfigError(f"unknown key 'site.{key}'; nearest key: {nearest}")
    untouched = {name: {f.name: f.default for f in fields(settings)} for name, settings in _SITES_OWN.items()}
    try:
        data: dict[str, Any] = {"labels": list[str](), **_section(content, "data")}
        return from_plain(SiteFile, {**written, "data": data, **untouched}, where="site file")
    except (ConfigError, RemoteProtocolError) as error:
        raise ConfigError(f"{error}; ask the operator for a new one") from error


def _section(content: Mapping[str, Any], section: str) -> dict[str, Any]:
    found = content.get(section, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{section} is {found!r}, expected a section [{section}]")
    return cast("dict[str, Any]", found)
