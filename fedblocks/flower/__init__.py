"""How does Flower carry a federation of ours? Its SuperLink, nodes and registry; our plan, checks, fold and client.

``server_app`` is a strategy around ``aggregator.server.serve``, ``client_app`` a passage to the node's ``fedblocks
join``; ``app/`` is the folder that ``flwr run`` takes. Messages of ours travel as opaque frames in one record.
docs/flower.md says how to use it, and whose authentication it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

APP_FOLDER: Final = Path(__file__).parent / "app"
#: The record of a Flower message, and its only key: the frames of a turn (protocol/turns.py), a list of bytes.
RECORD: Final = "fedblocks"
FRAMES: Final = "frames"


def require_flower() -> None:
    """Flower is there.

    Raises:
        ModuleNotFoundError: it is not; names the extra.
    """
    try:
        import flwr.serverapp  # noqa: F401
    except ModuleNotFoundError as error:
        text = "Flower is not installed here; pip install 'fedblocks[flower]', in an environment of its own"
        raise ModuleNotFoundError(text, name=error.name) from error
