"""Who may talk to this aggregator? Those whose public key stands in ``clients.json`` as enrolled.

The file lies in the run folder. ``fedblocks keys`` rewrites it as a whole (temporary file, fsync, rename, under a
lock); a running aggregator notices the change at the next message of any peer. ZeroMQ asks only when a connection opens
(:class:`Gate`), so the endpoint asks :meth:`Registry.standing` again for every message.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import zmq
import zmq.auth.base

from fedblocks.protocol.durable import write_durably
from fedblocks.protocol.keys import KeyPair, parse_key, read_key_pair, write_key_pair
from fedblocks.protocol.messages import ClientKey

CLIENTS_FILE: Final = "clients.json"
SERVER_KEY_FILE: Final = "server.key.json"
ZAP_DOMAIN: Final = "fedblocks"
MAX_NAME_CHARACTERS: Final = 64

Standing = Literal["enrolled", "revoked", "unknown"]


class RegistryError(ValueError):
    """The operator asked for something that the list of clients does not allow, or the list cannot be read."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """One line of the list. Times are Unix seconds, for the books only."""

    key: ClientKey
    name: str
    enrolled_unix_s: float
    revoked_unix_s: float | None = None

    @property
    def standing(self) -> Standing:
        return "enrolled" if self.revoked_unix_s is None else "revoked"

    def __post_init__(self) -> None:
        parse_key(self.key)
        if not 0 < len(self.name) <= MAX_NAME_CHARACTERS or not self.name.isprintable():
            raise RegistryError(f"name is {self.name[:80]!r}, expected 1 to {MAX_NAME_CHARACTERS} printable characters")


class Registry:
    """The list of enrolled and revoked client keys of one run folder.

    Raises:
        RegistryError: the file exists and is no such list.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / CLIENTS_FILE
        self._lock_path = folder / (CLIENTS_FILE + ".lock")
        self._stamp: tuple[int, int, int] | None = None
        self._by_key: dict[ClientKey, Enrolment] = {}
        self.problem: str | None = None
        """Why the last change of the file could not be read; the list before it is in force meanwhile."""
        self._stamp = self._current_stamp()
        if self._stamp is not None:
            self._by_key = _read(self._path)

    def list(self) -> tuple[Enrolment, ...]:
        """All lines, oldest first."""
        self.refresh()
        return tuple(self._by_key.values())

    def standing(self, key: ClientKey) -> Standing:
        """Enrolled, revoked or unknown, as the file says now."""
        self.refresh()
        enrolment = self._by_key.get(key)
        return "unknown" if enrolment is None else enrolment.standing

    def is_allowed(self, key: ClientKey) -> bool:
        """True for an enrolled key."""
        return self.standing(key) == "enrolled"

    def name_of(self, key: ClientKey) -> str | None:
        """The name that the operator gave to this key."""
        enrolment = self._by_key.get(key)
        return None if enrolment is None else enrolment.name

    def enrol(self, key: str, name: str, *, now_unix_s: float) -> Enrolment:
        """Lets this key in under this name; a revoked key may be let in again.

        Raises:
            KeyFileError: the text is no key.
            RegistryError: another enrolled key has the name, or the key is enrolled under another one.
        """
        enrolment = Enrolment(key=parse_key(key), name=name, enrolled_unix_s=now_unix_s)
        with self._writing():
            for other in self._by_key.values():
                if other.standing != "enrolled" or (other.key == key) == (other.name == name):
                    continue
                if other.key == key:
                    raise RegistryError(f"this key is enrolled as {other.name!r} already; revoke it first to rename it")
                raise RegistryError(f"{name!r} is the name of another enrolled key, {other.key}; choose another name")
            known = self._by_key.get(enrolment.key)
            if known is not None and known.standing == "enrolled":
                return known
            self._by_key[enrolment.key] = enrolment
            self._write()
        return enrolment

    def rotate(self, name: str, key: str, *, now_unix_s: float) -> Enrolment:
        """Puts a new key in the place of this client's: the old one is shut out in the same write of the list.

        Raises:
            KeyFileError: the text is no key.
            RegistryError: nobody enrolled has this name, or the key is on the list already.
        """
        enrolment = Enrolment(key=parse_key(key), name=name, enrolled_unix_s=now_unix_s)
        with self._writing():
            old = self._enrolled(name)
            if enrolment.key in self._by_key:
                raise RegistryError(f"this key is on the list already, as {self._by_key[enrolment.key].name!r}")
            self._by_key[old.key] = replace(old, revoked_unix_s=now_unix_s)
            self._by_key[enrolment.key] = enrolment
            self._write()
        return enrolment

    def revoke(self, name_or_key: str, *, now_unix_s: float) -> Enrolment:
        """Shuts this client out; a live connection of it ends at its next message.

        Raises:
            RegistryError: nobody enrolled has this name or key.
        """
        with self._writing():
            revoked = replace(self._enrolled(name_or_key), revoked_unix_s=now_unix_s)
            self._by_key[revoked.key] = revoked
            self._write()
        return revoked

    def _enrolled(self, name_or_key: str) -> Enrolment:
        for enrolment in self._by_key.values():
            if enrolment.standing == "enrolled" and name_or_key in (enrolment.name, enrolment.key):
                return enrolment
        names = ", ".join(sorted(e.name for e in self._by_key.values() if e.standing == "enrolled")) or "nobody"
        raise RegistryError(f"no enrolled client has the name or key {name_or_key[:60]!r}; enrolled: {names}")

    def refresh(self) -> bool:
        """Reads the file again if it changed; True if the list in force changed.

        A file that disappears or cannot be read leaves the last good list in force and sets ``problem``: a slip of an
        operator's editor must not throw out a whole consortium in mid-round.
        """
        stamp = self._current_stamp()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            by_key = _read(self._path)
        except (RegistryError, OSError) as error:
            self.problem = f"{error}; the list read before stays in force"
            return False
        self.problem = None
        changed = by_key != self._by_key
        self._by_key = by_key
        return changed

    def _current_stamp(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    @contextmanager
    def _writing(self) -> Generator[None, None, None]:
        fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            self.refresh()
            if self.problem is not None:
                raise RegistryError(f"{self.problem}; mend the file before changing it")
            yield
        finally:
            os.close(fd)

    def _write(self) -> None:
        lines = [json.dumps(asdict(enrolment)) for enrolment in self._by_key.values()]
        text = '{"clients": [\n' + ",\n".join(lines) + "\n]}\n"
        write_durably(self._path, text.encode())
        self._stamp = self._current_stamp()


def _read(path: Path) -> dict[ClientKey, Enrolment]:
    by_key: dict[ClientKey, Enrolment] = {}
    try:
        plain = cast("dict[str, list[dict[str, Any]]]", json.loads(path.read_bytes()))
        for line in plain["clients"]:
            enrolment = Enrolment(**line)
            by_key[enrolment.key] = enrolment
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RegistryError(f"{path}: not a list of clients: {error}") from error
    return by_key


def load_or_create_server_keys(folder: Path) -> KeyPair:
    """The aggregator's key pair of this run folder: made on the first call, read on the later ones.

    Raises:
        KeyFileError: the file is there and others may read it, or it holds no key.
    """
    path = folder / SERVER_KEY_FILE
    if not path.exists():
        public, secret = zmq.curve_keypair()
        write_key_pair(path, KeyPair(public=ClientKey(public.decode("ascii")), secret=secret.decode("ascii")))
    return read_key_pair(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Denial:
    """A handshake that was turned away."""

    key: ClientKey
    standing: Standing


class Gate:
    """Answers ZeroMQ's question "may this key in?" (ZAP, RFC 27) from the registry, in the caller's own poll loop."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], registry: Registry) -> None:
        self._registry = registry
        self._guest: ClientKey | None = None
        self.denials: deque[Denial] = deque(maxlen=100)
        """The last handshakes turned away, for the owner to take."""
        self._authenticator = zmq.auth.base.Authenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(ZAP_DOMAIN, credentials_provider=self)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """Poll this for reading, then call :meth:`answer`."""
        return cast("zmq.Socket[bytes]", self._authenticator.zap_socket)

    def answer(self) -> None:
        """Answers all handshakes that wait."""
        while self.socket.poll(0):
            request = self.socket.recv_multipart()
            coroutine = self._authenticator.handle_zap_message(request)
            try:
                # Its only await is for a callback that is itself a coroutine; ours is not, so one step ends it.
                coroutine.send(None)
            except StopIteration:
                continue
            raise AssertionError("the authenticator waited for something other than our callback")

    def admit_guest(self, key: ClientKey | None) -> None:
        """One more key that may in, for the endpoint's own self-test; None ends it."""
        self._guest = key

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by the authenticator with the Z85 key of a peer that proved to hold it."""
        client = ClientKey(key.decode("ascii"))
        if domain == ZAP_DOMAIN and client == self._guest:
            return True
        standing = self._registry.standing(client)
        if domain == ZAP_DOMAIN and standing == "enrolled":
            return True
        self.denials.append(Denial(key=client, standing=standing))
        return False

    def close(self) -> None:
        self._authenticator.stop()
