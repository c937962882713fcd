"""What does a site get from the operator? One small TOML file: where the run is, and what must match.

``fedblocks invite`` writes it, ``fedblocks join`` reads it; it holds no secret.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from fedblocks.protocol.codec import from_plain
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.messages import DataFormat
from fedblocks.protocol.run_config import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


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

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.client_name):
            raise ConfigError(
                f"client_name is {self.client_name!r}, expected 1 to 63 letters, digits, dots, hyphens or underscores"
            )
        if not re.fullmatch(r"tcp://[^\s:]+:\d{1,5}|tcp://\[[0-9a-fA-F:]+\]:\d{1,5}", self.address):
            raise ConfigError(f"address is {self.address!r}, expected tcp://host:port")
        if len(self.server_key) != 40:
            raise ConfigError(f"server_key has {len(self.server_key)} characters, expected the 40 of a Z85 public key")
        if not re.fullmatch(r"[0-9a-f]{64}", self.base_hash):
            raise ConfigError(f"base_hash is {self.base_hash[:20]!r}…, expected 64 hexadecimal digits")


def dump(site: SiteFile) -> str:
    """The file's text; :func:`load` reads it back unchanged."""
    lines = [
        "# Invitation to a fedblocks run. Use it with:",
        f"#   fedblocks join {site.client_name}.toml --data train.jsonl --model DIR",
        "# It holds no secret; the site's own key is made on the site and never leaves it.",
        "[site]",
    ]
    lines += [f"{f.name} = {json.dumps(getattr(site, f.name))}" for f in fields(site) if f.name != "data"]
    lines += ["", "# How the run turns rows into tokens; the same for every site.", "[data]"]
    lines += [f"{f.name} = {json.dumps(getattr(site.data, f.name))}" for f in fields(site.data)]
    return "\n".join(lines) + "\n"


def load(path: Path) -> SiteFile:
    """The invitation in ``path``.

    Raises:
        ConfigError: the file is missing, no TOML, or lacks a field.
    """
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; the operator makes it with: fedblocks invite RUN NAME") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    section = content.get("site")
    if set(content) != {"site", "data"} or not isinstance(section, dict):
        raise ConfigError(f"{path}: has the sections {sorted(content)}, expected [site] and [data]")
    plain = {**cast("dict[str, Any]", section), "data": content["data"]}
    try:
        return from_plain(SiteFile, plain, where="site file")
    except (ConfigError, RemoteProtocolError) as error:
        raise ConfigError(f"{path}: {error}; ask the operator for a new one") from error
