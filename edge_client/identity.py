"""Who is this client? A CURVE key pair that is made on the site and whose secret half never leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import zmq

from fedblocks.protocol.keys import KeyPair, read_key_pair, require_secure_zmq, write_key_pair
from fedblocks.protocol.messages import ClientKey

KEY_FILE: Final = "client.key.json"


def load_or_create_identity(folder: Path) -> KeyPair:
    """The key pair of the client whose state lies in ``folder``: made on the first call, read on the later ones.

    Raises:
        KeyFileError: the file is there and others may read it, or it holds no key; or libzmq is unfit.
    """
    require_secure_zmq(zmq.zmq_version_info(), has_curve=bool(zmq.has("curve")))
    path = folder / KEY_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        public, secret = zmq.curve_keypair()
        write_key_pair(path, KeyPair(public=ClientKey(public.decode("ascii")), secret=secret.decode("ascii")))
    return read_key_pair(path)
