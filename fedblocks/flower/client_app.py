"""What does Flower's ClientApp do? It passes the turn on to the node's own client, and its answer back.

Flower starts a process for each message; the client, its model and what it has cached stay in the process that
``edge_client/turns.py`` starts. The node's configuration says how: ``socket`` is the path of a Unix socket, ``join``
the arguments of ``fedblocks join``.
"""

from __future__ import annotations

from pathlib import Path

from fedblocks.edge_client.turns import ask
from fedblocks.flower import FRAMES, RECORD, require_flower

require_flower()

from flwr.app import ConfigRecord, Context, Message, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

app = ClientApp()


@app.train()
@app.evaluate()
@app.query()
def answer(message: Message, context: Context) -> Message:
    """The same for every kind: the frames say what is asked.

    Raises:
        ValueError: the node's configuration lacks a key.
        NotAnsweredError: the client could not be started, or ended; Flower sends the text back.
    """
    node = context.node_config
    if missing := {"socket", "join"} - set(node):
        raise ValueError(
            f"this SuperNode's --node-config has no {' and no '.join(sorted(missing))}; see docs/flower.md"
        )
    frames = message.content.config_records[RECORD][FRAMES]
    answered = ask(Path(str(node["socket"])), frames, join=str(node["join"]))
    return Message(RecordDict({RECORD: ConfigRecord({FRAMES: answered})}), reply_to=message)
