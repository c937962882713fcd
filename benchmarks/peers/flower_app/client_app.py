"""What does a client do? It adds one and sends back, after a wait where the crash cases need one."""

import time

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Adds one to every value."""
    time.sleep(float(context.run_config["client-wait-s"]))
    arrays = ArrayRecord({name: Array(array.numpy() + 1) for name, array in message.content["arrays"].items()})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 100})})
    return Message(content=content, reply_to=message)
