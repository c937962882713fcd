"""The same job in NVFlare's simulator: its NumPy FedAvg recipe, one process per client.

Run by NVFlare's own Python: ``python nvflare_job.py WORKSPACE CLIENTS VALUES ROUNDS WAIT_S``.
"""

import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.client.config import TransferType
from nvflare.recipe.sim_env import SimEnv


def main(workspace: str, clients: int, values: int, rounds: int, wait_s: float) -> None:
    """Makes the initial array and runs the job."""
    initial = Path(workspace).resolve() / "initial.npy"
    np.save(initial, np.zeros(values, dtype=np.float32))
    recipe = NumpyFedAvgRecipe(
        name="peers",
        initial_ckpt=str(initial),
        min_clients=clients,
        num_rounds=rounds,
        train_script=str(Path(__file__).with_name("nvflare_client.py")),
        train_args=str(wait_s),
        params_transfer_type=TransferType.FULL,
    )
    recipe.execute(SimEnv(num_clients=clients, num_threads=clients, workspace_root=workspace))


if __name__ == "__main__":
    main(sys.argv[1], *(int(one) for one in sys.argv[2:5]), float(sys.argv[5]))
