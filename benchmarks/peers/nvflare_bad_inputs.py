"""What does NVFlare's stock averaging make of a bad update? Run by NVFlare's own Python; prints a JSON object.

The weight of a result goes through the same function as in its FedAvg controller.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, answer
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_common.workflows.base_fedavg import _get_num_steps_weight


def results(found: list[tuple[dict[str, list[float]], float]]) -> list[FLModel]:
    """One round's results."""
    return [
        FLModel(
            params={key: np.asarray(values, dtype=np.float32) for key, values in arrays.items()},
            meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: weight},
        )
        for arrays, weight in found
    ]


def average(found: list[FLModel]) -> dict[str, np.ndarray]:
    """Added as they come."""
    helper = WeightedAggregationHelper()
    for number, result in enumerate(found):
        helper.add(result.params, _get_num_steps_weight(result), f"site-{number}", 0)
    return helper.get_result()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    np.seterr(all="ignore")
    print(json.dumps({name: answer(name, results, average) for name in CASES}))
