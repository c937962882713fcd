"""What does Flower's stock averaging take for a round of arrays that nobody trains?

A line of JSON goes to the journal for each round: from the start of ``configure_train`` to the end of
``aggregate_train``; and one at the end, with the mean of the result.
"""

import json
import time
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

NUM_ARRAYS = 4

app = ServerApp()


class Timed(FedAvg):
    """FedAvg that notes when a round begins and ends."""

    journal = ""
    began_s = 0.0

    def note(self, **entry: object) -> None:
        """Appends a line."""
        with open(self.journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begins a round."""
        self.began_s = time.time()
        self.note(event="round_began", round=server_round, unix_s=self.began_s)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Ends it."""
        found = list(replies)
        result = super().aggregate_train(server_round, found)
        good = sum(not reply.has_error() for reply in found)
        self.note(event="round", round=server_round, round_s=time.time() - self.began_s, num_accepted=good)
        return result


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Averages what every client added one to."""
    settings = context.run_config
    nodes = int(settings["min-nodes"])
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=nodes, min_evaluate_nodes=0, min_available_nodes=nodes)
    strategy.journal = str(settings["journal"])
    values = int(settings["num-values"]) // NUM_ARRAYS
    initial = ArrayRecord({f"x{i}": Array(np.zeros(values, dtype=np.float32)) for i in range(NUM_ARRAYS)})
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=int(settings["num-rounds"]))
    arrays = [array.numpy() for array in result.arrays.values()]
    low, high = min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays)
    strategy.note(event="finished", lowest=low, highest=high, num_values=sum(a.size for a in arrays))
