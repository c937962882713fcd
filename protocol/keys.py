"""How are CURVE keys written, read and kept from others' eyes?

A key is 32 bytes as 40 characters of Z85 (ZeroMQ RFC 32). A key pair lives in a JSON file that only its owner can read
(mode 0600); a file that others could read is refused, since the secret in it must then be taken as known.
Making a pair needs ZeroMQ and is done by the rooms that talk to it.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedblocks.protocol.messages import ClientKey

Z85_ALPHABET: Final = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
KEY_CHARACTERS: Final = 40
#: Before 4.3.3 a peer without a key could stop a server even with CURVE on (GLSA 202009-12).
MIN_ZMQ_VERSION: Final = (4, 3, 3)


class KeyFileError(ValueError):
    """A key or a key file that cannot be used; the text says what to do."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """A CURVE key pair in Z85 text. The secret stays out of every ``repr``."""

    public: ClientKey
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        parse_key(self.public)
        parse_key(self.secret, secret=True)


def parse_key(text: str, *, secret: bool = False) -> ClientKey:
    """The key, if this text is one.

    Raises:
        KeyFileError: not 40 characters of Z85. A secret is never repeated in the text.
    """
    shown = "a secret key" if secret else repr(text[:60])
    if len(text) != KEY_CHARACTERS:
        raise KeyFileError(f"{shown} has {len(text)} characters, a key has {KEY_CHARACTERS}; copy the whole line")
    for start in range(0, KEY_CHARACTERS, 5):
        value = 0
        for character in text[start : start + 5]:
            digit = Z85_ALPHABET.find(character)
            if digit < 0:
                raise KeyFileError(f"{shown} holds a character that no Z85 key has; copy the whole line")
            value = value * 85 + digit
        if value >= 1 << 32:
            raise KeyFileError(f"{shown} is no Z85 key: characters {start + 1} to {start + 5} are out of range")
    return ClientKey(text)


def write_key_pair(path: Path, pair: KeyPair) -> None:
    """Writes a new key file with mode 0600; an existing one is never overwritten (FileExistsError)."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        json.dump({"public": pair.public, "secret": pair.secret}, file)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_key_pair(path: Path) -> KeyPair:
    """The pair in a key file.

    Raises:
        KeyFileError: others may read the file, it belongs to someone else, or it holds no key pair.
        FileNotFoundError: there is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_IMODE(status.st_mode) & 0o077:
            mode = f"{stat.S_IMODE(status.st_mode):04o}"
            raise KeyFileError(
                f"{path}: mode is {mode}, expected 0600: others on this machine may have read the secret key; "
                f"delete the file to make a new key, or `chmod 600` it if you know that nobody did"
            )
        if status.st_uid != os.geteuid():
            raise KeyFileError(f"{path}: belongs to user {status.st_uid}, this process is user {os.geteuid()}")
        text = file.read(4096)
    try:
        plain = json.loads(text)
        return KeyPair(public=plain["public"], secret=plain["secret"])
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError):
        # The cause is dropped on purpose: a JSON error quotes the text, and the text holds the secret.
        raise KeyFileError(f"{path}: holds no key pair; delete the file to make a new key") from None


def require_secure_zmq(version: tuple[int, ...], *, has_curve: bool) -> None:
    """Refuses a ZeroMQ library that would leave a socket open to strangers.

    Raises:
        KeyFileError: too old, or built without CURVE.
    """
    if version < MIN_ZMQ_VERSION or not has_curve:
        found = ".".join(map(str, version))
        least = ".".join(map(str, MIN_ZMQ_VERSION))
        raise KeyFileError(
            f"libzmq {found} with CURVE: {has_curve}; at least {least} with CURVE is needed; "
            "install pyzmq from its wheel (pip install --force-reinstall pyzmq)"
        )
