"""What does a client of NVFlare's job do? It adds one and sends back, after a wait where the crash case needs one."""

import sys
import time

import nvflare.client as flare


def main() -> None:
    """Until the job is over."""
    flare.init()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        time.sleep(float(sys.argv[1]))
        params = {name: array + 1 for name, array in model.params.items()}
        flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))


if __name__ == "__main__":
    main()
