"""What does Flower's stock FedAvg make of a bad update? Run by Flower's own Python; prints a JSON object."""

import json
import logging
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, answer
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity


def messages(found: list[tuple[dict[str, list[float]], float]]) -> list[Message]:
    """One round's replies."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as a running ServerApp has them
    made = []
    for arrays, weight in found:
        asked = Message(content=RecordDict(), dst_node_id=1, message_type="train")
        record = ArrayRecord({key: Array(np.asarray(values, dtype=np.float32)) for key, values in arrays.items()})
        content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": weight})})
        made.append(Message(content=content, reply_to=asked))
    return made


def average(replies: list[Message]) -> dict[str, np.ndarray]:
    """Through ``aggregate_train``."""
    result, _ = FedAvg(fraction_evaluate=0.0).aggregate_train(1, replies)
    return {key: array.numpy() for key, array in result.items()}


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    np.seterr(all="ignore")
    print(json.dumps({name: answer(name, messages, average) for name in CASES}))
