"""Which bad updates does one client of four send? The others send [1, 1] with weight 1.

Read by each system's own Python, so nothing but the standard library is used here.
"""

import math

GOOD = [1.0, 1.0]
CASES = {
    "one NaN": {"x": [math.nan, 1.0], "weight": 1.0},
    "one infinity": {"x": [math.inf, 1.0], "weight": 1.0},
    "shape (1,) where (2,) is due": {"x": [9.0], "weight": 1.0},
    "shape (3,) where (2,) is due": {"x": [9.0, 9.0, 9.0], "weight": 1.0},
    "another key than the rest": {"y": [9.0, 9.0], "weight": 1.0},
    "weight 10^12": {"x": [9.0, 9.0], "weight": 1e12},
    "weight -1": {"x": [9.0, 9.0], "weight": -1.0},
    "weight NaN": {"x": [9.0, 9.0], "weight": math.nan},
    "weight 0 of all four": {"x": [1.0, 1.0], "weight": 0.0, "weight_of_the_others": 0.0},
    "values of 10^6 times the usual size": {"x": [1e6, 1e6], "weight": 1.0},
}
NUM_GOOD = 3


def replies(name: str) -> list[tuple[dict[str, list[float]], float]]:
    """Arrays and weight of the three good clients and the bad one."""
    case = CASES[name]
    weight = case.get("weight_of_the_others", 1.0)
    bad = {key: values for key, values in case.items() if not key.startswith("weight")}
    return [({"x": GOOD}, weight)] * NUM_GOOD + [(bad, case["weight"])]


def answer(name, prepare, average) -> str:
    """What the averaging makes of a case, in words; what stops while the replies are made is an error of ours."""
    prepared = prepare(replies(name))
    try:
        found = average(prepared)
    except Exception as error:  # noqa: BLE001 - whatever stops a run is the answer
        return f"stops: {type(error).__name__}"
    return "; ".join(f"{key} = {[float(f'{value:.4g}') for value in values]}" for key, values in sorted(found.items()))
